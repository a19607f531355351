"""Train and sample the embedded model while processes are killed, files damaged and disks filled.

Each round is drawn at random: a training or a prediction that is killed repeatedly, whose newest checkpoint or image is
damaged in between, and whose disk may be full at first; or a damaged file that is given to a command. The result is
compared with that of an undisturbed run, bit by bit. Meanwhile another training, with validation and samples, runs the
whole time, and its memory is monitored.

Full disks need the permission to mount file systems, on most machines that of root.

Example::

    python benchmarks/soak.py --minutes 20 --json soak.json
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from PIL import Image
from scipy.stats import theilslopes

from benchmarks.forked import Command
from benchmarks.report import ROOT, Parser, print_table, report, write_json
from sdmodule.errors import SettingsError

EMOJI = ROOT / "sdmodule" / "components" / "assets" / "emoji"
MAX_GROWTH = 2.0
"""Percent per hour by which memory may grow."""

TRAIN = [f"data.root={EMOJI}", "data.batch_size=2", "trainer.log_every_n_steps=1", "+steps=2", "sampler=ddim"]
TRAIN += ["callbacks=[checkpoint,ema,samples,export]", "callbacks.samples.num_prompts=1", "callbacks.ema.start_step=2"]
KILLED = ["trainer.max_steps=12", "trainer.val_check_interval=5", "callbacks.checkpoint.every_n_train_steps=2"]
PREDICT = ['prompt=["a red circle on a blue background","a small green star"]', "num_images_per_prompt=8", "steps=4"]
PREDICT += ["batch_size=3", "resume=true"]
SMALL_DISK, LARGE_DISK = 8 * 2**20, 400 * 2**20


class Soak:
    """The rounds and their counts.

    Args:
        folder: folder to work in.
        rng: source of all draws.
        quick: train for two steps only, sample four images, and disturb no training; three kills at most.
    """

    def __init__(self, folder: Path, rng: random.Random, quick: bool) -> None:
        self.folder = folder
        self.train = [*TRAIN, *(["trainer.max_steps=2"] if quick else KILLED)]
        self.predict = [*PREDICT, *(["num_images_per_prompt=2"] if quick else [])]
        self.kill_after = (0.2, 1.2) if quick else (1.0, 6.0)
        self.kills = 3 if quick else 6
        self.quick = quick
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.can_mount = True
        self.undisturbed = {kind: self._run_undisturbed(kind) for kind in ("train", "predict")}

    def _run_undisturbed(self, kind: str) -> dict[str, Any]:
        out = self.folder / f"undisturbed-{kind}"
        settings = self.train if kind == "train" else self.predict
        status, words = Command(kind, *settings, f"output_dir={out}", log=self.folder / "log").wait()
        if status:
            raise RuntimeError(words)
        return load_results(kind, out)

    def round(self) -> None:
        """One disturbance, drawn at random."""
        kinds = ["train", "predict", "file", "file"] + (["train disk", "predict disk"] if self.can_mount else [])
        kind = self.rng.choice(["predict"] if self.quick else kinds)
        if kind == "file":
            self.try_damaged_file()
            return
        out = self.folder / "out"
        if not kind.endswith("disk"):
            self.run_disturbed(kind, out)
            shutil.rmtree(out, ignore_errors=True)  # none if it was killed before it wrote anything
            return
        with self.small_disk() as enlarged:
            if enlarged is not None:
                self.run_disturbed(kind.partition(" ")[0], self.folder / "disk" / "out", enlarged)

    def run_disturbed(self, kind: str, out: Path, enlarged: Any = None) -> None:
        """A run that is killed and damaged, on a disk that may be full at first, compared with the undisturbed one."""
        for attempt in range(40):
            resume = ["ckpt_path=last"] if kind == "train" and list(out.glob("checkpoints/*.ckpt")) else []
            settings = [*self.train, *resume] if kind == "train" else self.predict
            command = Command(kind, *settings, f"output_dir={out}", log=self.folder / "log")
            self.counts["resumes"] += attempt > 0
            number = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            killing = attempt < self.kills and enlarged is None
            command.process.join(self.rng.uniform(*self.kill_after) if killing else 120)
            if command.process.is_alive():
                command.send(number)
                self.counts["kills"] += 1
            status, words = command.wait()
            if status == 0:
                break
            if status == 1:
                self.check_message(words, "cannot be written" if enlarged else "")
                if enlarged is None:
                    return
                self.counts["full disks"] += 1
                enlarged()
                enlarged = None
            elif status != 128 + number:
                self.complain(f"{kind} ended with {status}: {words}")
            if self.rng.random() < 0.3:
                self.damage(kind, out)
        self.compare(kind, out)

    def damage(self, kind: str, out: Path) -> None:
        """Damage the newest checkpoint or image, if it is not the only one."""
        files = sorted(out.glob("checkpoints/*.ckpt" if kind == "train" else "images/*.png"), key=modified)
        if len(files) < 2:
            return
        files[-1].write_bytes(damage(files[-1].read_bytes(), self.rng))
        self.counts["bad files offered"] += 1
        self.counts["bad files refused"] += 1  # otherwise the comparison at the end fails

    def compare(self, kind: str, out: Path) -> None:
        """Count differences from the undisturbed run."""
        ours, theirs = load_results(kind, out), self.undisturbed[kind]
        what = "trainings" if kind == "train" else "images"
        names = {"a training"} if kind == "train" else set(theirs)
        wrong = [name for name in sorted({*ours, *theirs}) if not same(ours.get(name), theirs.get(name))]
        self.counts[f"{what} compared"] += len(names)
        self.counts[f"{what} differing"] += len(wrong) if kind == "predict" else bool(wrong)
        self.counts["files lost"] += len(theirs.keys() - ours.keys())
        if wrong or list(out.rglob("*.part")):
            self.complain(f"{kind} differs in {wrong[:5]}, or left a partial file")

    def try_damaged_file(self) -> None:
        """Give a damaged checkpoint, image, prompt file or caption file to the command that reads it."""
        good = self.folder / "undisturbed-predict" / "images" / "00000-0.png"
        checkpoint = next((self.folder / "undisturbed-train" / "checkpoints").glob("*.ckpt"))
        photos = self.folder / "photos"
        shutil.copytree(EMOJI, photos, dirs_exist_ok=True)
        bad = self.folder / self.rng.choice(["bad.png", "bad.ckpt", "bad.jsonl", "photos/metadata.jsonl"])
        lines = b'{"prompt": "a red circle"}\n{"prompt": "a star", "seed": 3}\n'
        sources = {".png": good, ".ckpt": checkpoint, ".jsonl": photos / "metadata.jsonl"}
        content = lines if bad.name == "bad.jsonl" else sources[bad.suffix].read_bytes()
        bad.write_bytes(damage(content, self.rng))
        command = {
            "bad.png": ["predict", f"from={bad}", "steps=2"],
            "bad.ckpt": ["train", *TRAIN, "trainer.max_steps=13", "callbacks=[]", f"ckpt_path={bad}"],
            "bad.jsonl": ["predict", f"prompts={bad}", "steps=2"],
            "metadata.jsonl": ["train", *TRAIN, "trainer.max_steps=1", "callbacks=[]", f"data.root={photos}"],
        }[bad.name]
        command = [word for word in command if not ("callbacks=[]" in command and word.startswith("callbacks."))]
        status, words = Command(*command, f"output_dir={self.folder / 'bad'}", log=self.folder / "log").wait()
        self.counts["bad files offered"] += 1
        self.counts["bad files refused" if status else "bad files read"] += 1
        if status:
            self.check_message(words)
        shutil.rmtree(self.folder / "bad", ignore_errors=True)

    def check_message(self, words: str, part: str = "") -> None:
        """Check that a command ended with one sentence."""
        last = (words.splitlines() or [""])[-1]
        if "Traceback" in words or not last.startswith("error: ") or part not in last:
            self.complain(words)

    def complain(self, words: str) -> None:
        """Record a failure."""
        self.counts["failures"] += 1
        self.complaints.append(words)

    @contextmanager
    def small_disk(self) -> Iterator[Any]:
        """A small disk; yields a function that enlarges it, or None if no disk can be mounted."""
        disk = self.folder / "disk"
        disk.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(disk)]
        self.can_mount = (
            shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        )
        if not self.can_mount:
            yield None
            return
        larger = ["mount", "-o", f"remount,size={LARGE_DISK}", str(disk)]
        try:
            yield lambda: subprocess.run(larger, check=True)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def modified(file: Path) -> int:
    """Modification time of a file."""
    return file.stat().st_mtime_ns


def damage(content: bytes, rng: random.Random) -> bytes:
    """A file that is cut off, has a flipped bit, or has a run of zeros."""
    at = rng.randrange(1, len(content))
    changed = bytearray(content)
    kind = rng.randrange(3)
    if kind == 0:
        return content[:at]
    if kind == 1:
        changed[at] ^= 1 << rng.randrange(8)
    else:
        changed[at : at + 100] = bytes(min(100, len(content) - at))
    return bytes(changed)


def load_results(kind: str, out: Path) -> dict[str, Any]:
    """Results of a run by name: the pixels of images; or weights, optimizer state and EMA of a training."""
    if kind == "predict":
        return {file.name: Image.open(file).tobytes() for file in sorted((out / "images").glob("*.png"))}
    newest = max((out / "checkpoints").glob("*.ckpt"), key=modified)
    content = torch.load(newest, weights_only=True)
    exported = {str(file.relative_to(out)): file.read_bytes() for file in (out / "export").rglob("*.safetensors")}
    return {**{name: content[name] for name in ("global_step", "state_dict", "optimizer_states")}, **exported} | {
        "average": content["callbacks"]["EMA"]
    }


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values, with all tensors in them, are equal to the bit."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@contextmanager
def monitor_memory(pid: int) -> Iterator[list[tuple[float, int]]]:
    """Record the resident memory of a process once per second, as pairs of seconds and bytes."""
    samples: list[tuple[float, int]] = []
    process, over, start = psutil.Process(pid), threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(1.0) and process.is_running():
            samples.append((time.monotonic() - start, process.memory_info().rss))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def growth(samples: Sequence[tuple[float, int]]) -> float | None:
    """Memory growth in percent per hour after the first quarter of the time; None for too few samples."""
    times, sizes = zip(*samples[len(samples) // 4 :], strict=True) if len(samples) > 20 else ((), ())
    if not times:
        return None
    slope = theilslopes(sizes, times).slope  # the median over all pairs, since an allocator grows in steps
    return float(slope) * 3600 / (sum(sizes) / len(sizes)) * 100


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark, print, write; the report."""
    parser = Parser(
        "Train and sample while processes are killed, files damaged and disks filled.", quick="until a kill"
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws; when kills hit depends on the machine")
    settings = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        soak = Soak(folder, random.Random(settings.seed), settings.quick)
        steady = [*TRAIN, "trainer.max_steps=1000000000", "trainer.val_check_interval=50"]
        steady += ["callbacks=[checkpoint,ema,samples,timing]", f"output_dir={folder / 'steady'}"]
        watched = Command("train", *steady, log=folder / "steady-log")
        start, seconds = time.monotonic(), 0.0 if settings.quick else settings.minutes * 60
        try:
            with monitor_memory(watched.process.pid) as memory:
                while (now := time.monotonic() - start) < seconds or not soak.counts["kills"]:
                    soak.round()
        finally:  # it would go on for ever
            watched.send(signal.SIGTERM)
        status, words = watched.wait()
        if status != 143:
            soak.complain(words)
        steps = [
            torch.load(file, weights_only=True)["global_step"] for file in folder.glob("steady/checkpoints/*.ckpt")
        ]
    row = {"minutes": round(now / 60, 1), "kills": 0, "resumes": 0, "full disks": 0}
    row |= {"bad files offered": 0, "bad files refused": 0, "bad files read": 0, "images compared": 0}
    row |= {"images differing": 0, "trainings compared": 0, "trainings differing": 0, "files lost": 0, "failures": 0}
    row |= soak.counts
    slope = growth(memory)
    row |= {
        "steps of the steady training": max(steps, default=0),
        "memory growth, % per hour": slope and round(slope, 2),
    }
    print_table([{"what": name, "": value} for name, value in row.items()])
    for words in soak.complaints:
        print(f"\n{words}", file=sys.stderr)
    result = report([__file__, *arguments], [row])
    if settings.json:
        write_json(settings.json, result)
    return result


def main() -> None:
    """Exit with status 1 if anything was lost, differed, failed or grew."""
    try:
        [row] = run(sys.argv[1:])["rows"]
    except SettingsError as error:
        sys.exit(str(error))
    grew = (row["memory growth, % per hour"] or 0.0) > MAX_GROWTH
    bad = ("images differing", "trainings differing", "files lost", "failures")
    sys.exit(int(grew or any(row[name] for name in bad)))


if __name__ == "__main__":
    main()
