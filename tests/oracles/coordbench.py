"""Writes scores by torchgeo-bench's own probes on the tables of `test_coordbench.py`, which compares ours with them.

python -m tests.oracles.coordbench PROBE    # coordbench/probe.py, from a checkout that has it, with its `knn.py`
"""

import importlib.util
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from tasks.evaluation.coordbench import read_suite
from tasks.evaluation.embedders import embedders
from tasks.params import EvaluateParams
from tests.tasks.evaluation.test_coordbench import EMBEDDERS, ORACLE, write_suite


def main(path: str) -> None:
    """Writes a row for each embedder, task, method and split."""
    spec = importlib.util.spec_from_file_location("probe", path)
    theirs = sys.modules["probe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    rows = []
    with TemporaryDirectory() as scratch:
        suite = read_suite(write_suite(Path(scratch)).as_uri())
    for one in embedders(None, None, None, EvaluateParams(embedder=EMBEDDERS)):
        for bench in suite:
            lon, lat = bench.lonlat.T
            features = np.asarray(one.embed(bench.lonlat), np.float32)
            for split in ("official",) if bench.scored is not None else ("random", "spatial"):
                how = {"test_mask": bench.scored, "fold_assign": None}
                if split == "spatial":
                    how["fold_assign"] = theirs.spatial_fold_ids(lat, lon)
                for task, labels in bench.tasks.items():
                    told = {"linear": theirs.linear_probe_score(features, labels, bench.kind, **how)}
                    if bench.kind == "classification":
                        told["knn5"] = theirs.knn_probe_score(features, labels, **how)
                    for method, (score, each) in told.items():
                        std = float(np.std(each)) if len(each) > 1 else 0.0
                        rows.append((one.name, bench.name, task, method, split, score, score - std))
    names = ["model_name", "dataset", "task", "method", "split", "metric_value", "ci_lower"]
    pd.DataFrame(rows, columns=names).to_csv(ORACLE, index=False)


if __name__ == "__main__":
    main(sys.argv[1])
