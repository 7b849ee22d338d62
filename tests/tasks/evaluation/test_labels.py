"""The demo's labels at places that everybody knows."""

import numpy as np

from tasks.evaluation import labels

PARIS, SAHARA, AMAZON, EVEREST = [2.35, 48.86], [10.0, 24.0], [-63.0, -5.0], [86.92, 27.99]


def at(name, *places):
    look_up = labels.TASKS[name][1]
    return look_up(np.array(places, float))


def test_known_places():
    assert at("country", PARIS, AMAZON)[0].tolist() == ["France", "Brazil"]
    climate, known = at("climate zone", SAHARA, AMAZON)
    assert known.all()
    assert climate[0] != climate[1]
    assert at("land cover", SAHARA, AMAZON)[0].tolist() == [16, 2]  # IGBP barren, evergreen broadleaf
    elevation = at("elevation", EVEREST, AMAZON)[0]
    assert elevation[0] > 4000 > 300 > elevation[1]
    temperature = at("temperature", SAHARA, [100.0, 70.0])[0]
    assert temperature[0] > 290 > 265 > temperature[1]


def test_tasks_leave_out_what_has_no_label():
    for made in labels.demo_labels(300, 1):
        assert len(made.labels) == len(made.lonlat) > 200, made.name
