"""Feed the readers of strangers' files with damaged ones, guided by the code that these reach.

    make fuzz                                           all targets, 10 minutes
    python tests/security/fuzz.py TARGET --seconds 60   one of them

A reader may return or raise a UserError. Any other exception, a hang and more than 2 GB of memory
are findings: the input and the traceback go into a folder whose path is printed. Needs atheris
(the extra `fuzz`); fuzz_targets.py has the targets.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "torchprime"
SECONDS = 600
AT_ONCE = 2
HANGS_AFTER, MOST_MEGABYTES, MOST_BYTES = 10, 2048, 8192
MEMORY = Path("/dev/shm")
TO_START = 60  # seconds that imports may take
# libFuzzer's name for the input that ended the process.
ENDED_BY = re.compile(r"^(crash|timeout|oom|leak)-")


# One target, in a process of its own --------------------------------------------------------------


def fuzz_one(name: str, seconds: int, out: Path) -> None:
    """Feed one reader until the time is over; findings go into `out`. Does not return."""
    atheris = importlib.import_module("atheris")  # is there with make fuzz only

    sys.path[:0] = [str(HERE), str(PACKAGE.parent)]
    with atheris.instrument_imports(include=["torchprime"]):
        target = importlib.import_module("fuzz_targets").TARGETS[name]
        from torchprime.data.rows import limits as row_limits
        from torchprime.errors import UserError
    row_limits.RENDER_SECONDS = 0.5  # far below HANGS_AFTER
    work = Path(tempfile.mkdtemp())
    corpus, ground = work / "corpus", work / "ground"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        target.read(seed, _emptied(ground))  # a seed that is refused would test little
        (corpus / f"seed-{number}").write_bytes(seed)
    words = work / "words"
    words.write_text("".join(f"{json.dumps(word)}\n" for word in target.words.split()))

    def feed(data: bytes) -> None:
        try:
            target.read(data, _emptied(ground))
        except UserError:
            pass
        except Exception as error:
            _keep(error, data, out)

    def change(data: bytes, most: int, seed: int) -> bytes:
        return changed(data, target.form, most, random.Random(seed), atheris.Mutate)

    options = [
        f"-max_total_time={seconds}",
        f"-timeout={HANGS_AFTER}",
        f"-rss_limit_mb={MOST_MEGABYTES}",
        f"-max_len={MOST_BYTES}",
        f"-artifact_prefix={out}/",
        "-print_final_stats=1",
        *([f"-dict={words}"] if target.words else []),
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], feed, custom_mutator=change)
    atheris.Fuzz()


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _keep(error: Exception, data: bytes, out: Path) -> None:
    """Write down the first input of each fault: one kind of exception from one line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    last = (ours or frames)[-1]
    told = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"
    path = out / f"raised-{told}"
    if not path.exists():
        path.write_bytes(data)
        text = "".join(traceback.format_exception(error))
        (out / f"{path.name}.txt").write_text(text[-20_000:], errors="replace")


# Mutations of inputs ------------------------------------------------------------------------------

ODD = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308),
    *(float("nan"), float("inf"), "", " ", "nan", "1", "a" * 2000, "\ud800", "\x00", "\x1b[2J"),
    *("../../x", "/x", "{}", "[]", "null", [], {}, [[]], [{}], {"": None}, [None], ["a"], {"a": 1}),
)


def changed(data: bytes, form: str, most: int, chance: random.Random, mutate: Any) -> bytes:
    """Change an input: mostly a value of its JSON where it has some, else its bytes."""
    if form != "bytes" and chance.random() < 0.7:
        try:
            made = _changed_json(data, form, chance)
        except (ValueError, RecursionError):
            made = b""
        if 0 < len(made) <= most:
            return made
    return bytes(mutate(data, most))


def _changed_json(data: bytes, form: str, chance: random.Random) -> bytes:
    if form == "header":
        length = int.from_bytes(data[:8], "little")
        header = _changed_json(data[8 : 8 + length], "json", chance)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if form == "lines":
        lines = data.split(b"\n")
        place = chance.randrange(len(lines))
        lines[place] = _changed_json(lines[place], "json", chance)
        return b"\n".join(lines)
    whole = [json.loads(data)]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _change_value(whole, chance)
    return json.dumps(whole[0], ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def _change_value(whole: list[Any], chance: random.Random) -> None:
    """Put something odd, or another value of the document, in one place; or take it away."""
    places = _places(whole)
    inside, key = chance.choice(places)
    way = chance.random()
    if way < 0.1 and inside is not whole:
        del inside[key]
    elif way < 0.2:
        other, name = chance.choice(places)
        inside[key] = copy.deepcopy(other[name])
    elif way < 0.3:
        inside[key] = _nested(inside[key], chance.choice((1, 5, 70, 300)))
    elif way < 0.4 and isinstance(inside, dict):
        name = chance.choice(("", "a", "\ud800", "__class__", "nonfinite", "name"))
        inside[name] = copy.deepcopy(inside[key])
    elif way < 0.5 and isinstance(inside, list) and inside is not whole:
        inside *= chance.choice((2, 8))  # what is made stays small: it counts as memory, too
    else:
        inside[key] = copy.deepcopy(chance.choice(ODD))


def _places(whole: list[Any]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    open_: list[Any] = [whole]
    while open_:
        value = open_.pop()
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            found.append((value, key))
            if isinstance(inner, dict | list):
                open_.append(inner)
    return found


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


# All targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The result of one target.

    Attributes:
        executions: None where the process ended before libFuzzer counted them.
    """

    name: str
    executions: int | None
    findings: tuple[str, ...]

    def told(self) -> str:
        count = "no" if self.executions is None else f"{self.executions:,}"
        named = f": {', '.join(self.findings)}" if self.findings else ""
        return f"{self.name}: {count} executions, {len(self.findings)} findings{named}"


def run_target(name: str, seconds: int, folder: Path) -> Result:
    """Fuzz one target in a process of its own. One that never ended is a finding, too."""
    out = folder / name.lstrip(".")
    out.mkdir()
    command = [sys.executable, __file__, name, "--seconds", str(seconds), "--in", str(out)]
    log = out / "log.txt"
    problem = []
    # In memory where there is such a folder. libFuzzer ends without cleaning up.
    place = MEMORY if MEMORY.is_dir() else None
    with log.open("wb") as file, tempfile.TemporaryDirectory(dir=place) as work:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": work},
                timeout=seconds + HANGS_AFTER + TO_START,
            )
            problem = [f"exit code {done.returncode}"] if done.returncode else []
        except subprocess.TimeoutExpired:
            problem = ["never ended"]
    text = log.read_text(errors="replace")
    counts = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)
    raised = [path.stem for path in out.glob("raised-*.txt")]
    ended = [path.name for path in out.iterdir() if ENDED_BY.match(path.name)]
    findings = tuple(sorted([*raised, *(ended or problem)]))
    return Result(name, int(counts[-1]) if counts else None, findings)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", nargs="?", metavar="TARGET", help="all if it is left away")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="in total")
    parser.add_argument("--in", dest="out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out is not None:
        fuzz_one(given.target, given.seconds, given.out)
    try:
        importlib.import_module("atheris")
    except ImportError:
        parser.error("atheris is not installed; run make fuzz, or pip install -e '.[fuzz]'")
    sys.path[:0] = [str(HERE), str(PACKAGE.parent)]
    names = list(importlib.import_module("fuzz_targets").TARGETS)
    if given.target is not None and given.target not in names:
        parser.error(f"TARGET: given {given.target!r}, expected one of {', '.join(names)}")
    names = names if given.target is None else [given.target]
    at_once = min(AT_ONCE, len(names))
    seconds = max(1, given.seconds * at_once // len(names))
    folder = Path(tempfile.mkdtemp(prefix="torchprime-fuzz-"))
    print(f"{len(names)} targets, {seconds} s each; findings go into {folder}", flush=True)
    begin = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda name: run_target(name, seconds, folder), names))
    print("\n".join(result.told() for result in results))
    bad = sum(bool(result.findings) for result in results)
    print(f"{time.monotonic() - begin:.0f} s; targets with findings: {bad}; see {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
