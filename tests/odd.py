"""The strangest legal values of each parameter, alone and in pairs, through the pipeline of a small planet.

    python -m tests.odd --minutes 20 --seed 0
    python -m tests.odd --case '{"publish.step": "1e-300"}'

Values come from the models' own schemas, as texts, as a command line has them. Each case runs in a process of its own,
with limits of time and memory. A value is refused before its step writes anything, or what is stored holds what
`tests.small_pipeline` asks of it; all else is a finding, told as the command that repeats it.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra import sandbox
from infra.errors import UserError
from infra.sandbox.planet import PlanetSpec
from tests import small_pipeline
from tests.conftest import CELLS
from tests.small_pipeline import BASE, Case

Value = tuple[str, str]  # an option, and its text
Run = Callable[[Case, dict[str, str]], Any]
SECONDS, BYTES, PATIENCE = 60, 6 << 30, 600  # of one case: of CPU, of memory; seconds that it may take in all
SIZE = 12  # values in one case, which has so many pairs
LONG = {  # these say how much work there is: a case may still be at work when its time is over
    "sample.patches", "sample.max_tries", "sample.patch_pixels", "train.steps", "train.degree", "train.hidden",
    "train.dim", "train.members", "train.sites", "train.tokens", "train.views", "train.encoder_dim",
    "encode.values_dim", "publish.step", "evaluate.repeats", "evaluate.folds", "evaluate.points", "ablate.repeats",
    "ablate.folds", "ablate.points", "sample.spacing_km",
    "evaluate.spacing_km", "ablate.spacing_km",
}  # fmt: skip
NO_NUMBERS = ("nan", "inf", "-inf", "true", "", "null", "1_0", "١", "1e1")
NO_LISTS = ("[]", '[""]', "[null]", "", "[", "null", '["\0"]', '["é"]')
NO_TEXTS = ("", " ", "null", "é", "../x", "a" * 300, "\0", "[", "{}", "١")
TEXTS = {  # by the last word of the option: odd ones that a text or a list without an enumeration admits
    "datetime": ("../..", "2021-07-01/..", "../2021-07-31", "2021", "2021-07", "2021-06-30", "2022-01-01/2021-01-01",
                 "2021-01-01T00:00:00Z/2021-12-31T23:59:59.999Z", "2021-07-15T00:00:00+14:00/2021-12-31T00:00:00Z"),
    "date": ("2021-07-15", "0001-01-01", "9999-12-31", "20210715", "2021-W28-4", "2024-02-29"),
    "source": ("POINTS", "LABELS"),
    "bands": ('["B02"]', "B02", '["B08", "B02"]', '["B02", "B02"]', '["b02"]', '["B01"]', "B02,B03"),
    "name": ("rcf", "RCF", "checkpoint", "satmae", "math:sqrt", "tests.core.encoders.my_encoder:Means", ":", "a:b:c"),
    "weights": ("POINTS",),
    "crs": ("EPSG:3035", "EPSG:4326", "epsg:4326", "OGC:CRS84", "EPSG:3857", "4326", "EPSG:4258", "EPSG:0"),
    "region": ('["DE"]', '["5 45 10 50", "FR"]', '["fr, de"]', '["170 -20 -170 -10"]', '["POINTS"]', '["nowhere"]'),
    "parent": ("GRID",),
    "device": ("cpu", "cuda:99", "cuda:00"),
    "embedder": ('["coordinates"]', '["coordinates", "coordinates"]', '["wrap", "theory", "unit vectors"]',
                 '["spherical harmonics"]', '["range+"]', '["location encoder", "range"]', '["satclip"]', '["GRID"]'),
    "labels": ('["LABELS", "LABELS"]', '["POINTS"]'),
    "label": ("warmth", "name", "lon", "Höhe", "constant"),
    "lon": ("lon", "lat", "x"), "lat": ("lat", "lon"),
    "steps": ('["1"]', "[1, 1]", "[1e308]", "[0]", "[-1]", '["nan"]', '["inf"]', "[0.5, 2]", "[1e-300]", "[5e9]"),
    "databases": ('["DATABASE"]', '["DATABASE", "DATABASE"]'),
}  # fmt: skip


def odd_values(name: str, schema: dict[str, Any]) -> list[str]:
    """Texts of the strangest values of an option, in order of size where they are numbers; illegal ones too."""
    kinds = schema.get("anyOf", [schema])
    found = [text for kind in kinds for text in _of_kind(kind)]
    if any(kind.get("type") in ("string", "array") and "enum" not in kind for kind in kinds):
        found += TEXTS.get(re.split(r"[._]", name)[-1], ())
    return list(dict.fromkeys(text for text in found if text != BASE.get(name)))


def _of_kind(schema: dict[str, Any]) -> list[str]:
    if "enum" in schema or "const" in schema:
        return [str(value) for value in schema.get("enum", [schema.get("const")])]
    kind = schema["type"]
    if kind in ("integer", "number"):
        return [*_numbers(schema, 1 if kind == "integer" else None), *NO_NUMBERS]
    return list({"array": NO_LISTS, "boolean": ("true", "false", "2", ""), "null": ("null",)}.get(kind, NO_TEXTS))


def _numbers(schema: dict[str, Any], step: int | None) -> list[str]:
    """The bounds, just within and without, or far away where there is none; and what no decimal hits."""
    far, few = (2**63, (0, 1, 2, 3, 7)) if step else (1e308, (-0.0, 0.1, 1 / 3, 5e-324, 1e-7, 7.0, 1e9))
    found: list[float] = list(few)
    for bound, away in (("minimum", -math.inf), ("maximum", math.inf)):
        at = schema.get(bound, schema.get(f"exclusive{bound.capitalize()}", math.copysign(far, away)))
        found += [at, at + 1, at - 1] if step else [at, math.nextafter(at, away), math.nextafter(at, -away)]
    return sorted({repr(int(x) if step else float(x)) for x in found}, key=lambda text: (float(text), text))


class Pairs:
    """A covering array that is made while it is played: greedy, of a seed."""

    def __init__(self, values: list[Value], seed: int) -> None:
        self.values, self.rng, self.right = list(values), random.Random(seed), set[Value]()
        order = [frozenset(two) for two in itertools.combinations(sorted(values), 2) if two[0][0] != two[1][0]]
        self.rng.shuffle(order)
        self.open = dict.fromkeys(order)
        self.all = len(order)

    def play(self, play: Callable[[Case], str]) -> Iterator[tuple[Case, str]]:
        """Yields cases and what became of them, until each pair was in one that was right, or alone.

        Args:
            play: Plays a case. One that is refused is played in halves, so that no value hides what others do.
        """
        while self.open:
            pair = next(iter(self.open))
            yield from self._settle(self._filled(pair, play), play)
            if pair in self.open:
                yield from self._settle(dict(sorted(pair)), play)
            self.open.pop(pair, None)

    def _filled(self, pair: frozenset[Value], play: Callable[[Case], str]) -> Case:
        case = dict(sorted(pair))
        for name, text in self.rng.sample(self.values, len(self.values)):
            new = any(frozenset(((name, text), other)) in self.open for other in case.items())
            if len(case) < SIZE and name not in case and new:
                case[name] = text
        return case

    def _settle(self, case: Case, play: Callable[[Case], str]) -> Iterator[tuple[Case, str]]:
        said = play(case)
        yield case, said
        if said == "right":
            self.right |= case.items()
        if said == "right" or len(case) == 2:
            for two in itertools.combinations(case.items(), 2):
                self.open.pop(frozenset(two), None)
        if not is_finding(said) and said != "right":
            for part in self._parts(case):
                yield from self._settle(part, play)

    def _parts(self, case: Case) -> list[Case]:
        """What of a refused case is still to be played; a value that is refused alone is in no pair any more."""
        values, middle = list(case.items()), len(case) // 2
        if len(case) == 1:
            self.values.remove(values[0])
            lost = [pair for pair in self.open if values[0] in pair]
            self.all -= len(lost)
            for pair in lost:
                del self.open[pair]
            return []
        if len(case) == 2:
            return [dict([value]) for value in values if value in self.values and value not in self.right]
        halves = (values[:middle], values[middle:])
        return [dict(h) for h in halves if any(frozenset(t) in self.open for t in itertools.combinations(h, 2))]


class Harness:
    """Plays cases, each from a copy of the base's products, which an empty case makes."""

    def __init__(self, folder: Path, run: Run = small_pipeline.run, start: str = "forkserver") -> None:
        self.folder, self.run, self.home = folder, run, folder / "home"
        self.context = multiprocessing.get_context(start)
        self.context.set_forkserver_preload(["tests.small_pipeline"])
        self.paths = {name: str(folder / file) for name, file in (
            ("HOME", "home"), ("BASE", "base.json"), ("LABELS", "labels.csv"), ("POINTS", "points.csv"))}  # fmt: skip
        write_tables(self.paths)
        self.home.mkdir()
        if (said := self._play({})) != "right":
            sys.exit(f"the base itself fails: {said}")
        self.home.rename(folder / "base")
        urls = json.loads(Path(self.paths["BASE"]).read_text())
        self.paths |= {"GRID": urls["publish"], "DATABASE": urls["encode"]}

    def play(self, case: Case) -> str:
        """What became of a case: `right`, `refused: why`, `long: why`, or a finding."""
        if (said := self.form(case)) != "right":
            return said
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.folder / "base", self.home)
        return self._play(case)

    def form(self, case: Case) -> str:
        """What the forms say of a case."""
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            return outcome(small_pipeline.parsed, case, self.paths)
        finally:
            signal.alarm(0)

    def _play(self, case: Case) -> str:
        told, log = self.folder / "told", self.folder / "log"
        told.unlink(missing_ok=True)
        process = self.context.Process(target=play_here, args=(self.run, case, self.paths, str(told), str(log)))
        process.start()
        process.join(PATIENCE)
        process.kill()
        process.join()
        if told.exists():
            return told.read_text()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) and (long := sorted(LONG & case.keys())):
            return f"long: work of {', '.join(long)}"
        return f"ENDED by exit code {process.exitcode}\n{log.read_text(errors='replace')[-2000:]}"


def _too_long(*_: Any) -> None:
    raise TimeoutError


def play_here(run: Run, case: Case, paths: dict[str, str], told: str, log: str) -> None:
    """Plays a case in this process, for good; what became of it goes to the file `told`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.environ["RANGEGRID_STORAGE_URL"] = Path(paths["HOME"]).as_uri()
    Path(told).write_text(outcome(run, case, paths))


def outcome(run: Run, case: Case, paths: dict[str, str]) -> str:
    try:
        run(case, paths)
    except UserError as error:
        return f"refused: {error}"
    except BaseException:
        return f"FAILED {traceback.format_exc()}"
    return "right"


def write_tables(paths: dict[str, str]) -> None:
    """Labels of a lattice on the globe, and a few points where longitudes and land begin and end."""
    rows = ["lon,lat,warmth,name,Höhe,constant"]
    for lat, lon in itertools.product(range(-50, 75, 10), range(-175, 180, 10)):
        warm = math.cos(math.radians(3 * lat))
        rows.append(f"{lon},{lat},{warm},{'é' if warm > 0.8 else 'b'},{warm},1")
    Path(paths["LABELS"]).write_text("\n".join(rows))
    Path(paths["POINTS"]).write_text("lon,lat\n2.35,48.86\n180,52\n-180,48\n0,45\n5.5,50.5\n179.5,44\n")


def is_finding(said: str) -> bool:
    return not said.startswith(("right", "refused", "long"))


def command(case: Case) -> str:
    return f"python -m tests.odd --case {shlex.quote(json.dumps(case, ensure_ascii=False))}"


def drive(harness: Harness, seed: int, minutes: float, only: str = "") -> int:
    """Plays values alone for half of the time, then pairs of the smallest, the largest and an odd one of each option.

    Returns:
        The number of findings, each told when it is found.
    """
    until, findings = time.monotonic() + 60 * minutes, 0
    driven = {n: odd_values(n, schema) for n, schema in small_pipeline.options().items() if re.search(only, n)}
    alone: dict[Value, str] = {(name, text): "" for name, texts in driven.items() for text in texts}

    def tell(case: Case, said: str) -> None:
        nonlocal findings
        if is_finding(said):
            findings += 1
            print(f"FINDING: {command(shrunk(case, said, harness.play))}\n{said}\n", flush=True)

    for name, text in alone:
        tell({name: text}, said := harness.form({name: text}))
        alone[name, text] = said
    legal = [value for value, said in alone.items() if said == "right"]
    print(f"seed {seed}: {len(alone)} values, {len(legal)} legal", flush=True)
    order, played = random.Random(seed).sample(legal, len(legal)), 0
    while played < len(order) and time.monotonic() < until - 30 * minutes:
        value = order[played]
        tell(dict([value]), said := harness.play(dict([value])))
        alone[value], played = said, played + 1
    print(f"seed {seed}: {played} played alone", flush=True)
    pairs = Pairs(extremes([value for value, said in alone.items() if said == "right"], seed), seed)
    for case, said in pairs.play(harness.play):
        tell(case, said)
        if time.monotonic() > until:
            break
    print(f"seed {seed}: {pairs.all - len(pairs.open)} of {pairs.all} pairs; {findings} findings", flush=True)
    return findings


def extremes(values: list[Value], seed: int) -> list[Value]:
    """Of each option the first value, the last and another."""
    rng, chosen = random.Random(seed), []
    for _, group in itertools.groupby(values, key=lambda value: value[0]):
        texts = list(group)
        chosen += dict.fromkeys([texts[0], texts[-1], rng.choice(texts)])
    return chosen


def shrunk(case: Case, said: str, play: Callable[[Case], str]) -> Case:
    """The case without what its finding does not need."""
    for name in list(case):
        less = {other: text for other, text in case.items() if other != name}
        if less and last_line(play(less)) == last_line(said):
            case = less
    return case


def last_line(said: str) -> str:
    return said.strip().rpartition("\n")[2]


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--minutes", type=float, default=20)
    reader.add_argument("--only", default="", help="regular expression of the options to drive, as ^publish")
    reader.add_argument("--case", type=json.loads, help="one case: texts by `step.option`, as JSON")
    asked = reader.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        sandbox.running(Path("build/odd"), PlanetSpec(cells=CELLS), prefect=False) as box,
    ):
        os.environ.update(box.environment())
        harness = Harness(Path(folder))
        if asked.case is None:
            sys.exit(drive(harness, asked.seed, asked.minutes, asked.only) > 0)
        said = harness.play(asked.case)
        print(said)
        sys.exit(is_finding(said))


if __name__ == "__main__":
    main()
