"""Section ``table`` of ``benchmarks/gpu.py``: the table that the project which this one began as has published."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.gpu_run import GpuRun
from benchmarks.gpu_sampling import seconds_of
from benchmarks.training_peers import make_module

PUBLISHED = {0.0: 542.20, 0.5: 427.65, 0.75: 393.05}
"""Seconds of 100 images of 512 pixels in 20 calls of 5, by merge ratio, on an RTX 3090 in float32."""

PROMPT = "A mecha robot in a favela in expressionist style"
CALLS = 20


def table(run: GpuRun) -> None:
    """One call of five images for each row; the time of all twenty is twenty times that, and labelled so."""
    module = make_module(run.model("float32"))
    steps, images = (2, 1) if run.dry else (50, 5)
    backends = ["sdpa", *(["xformers"] if find_spec("xformers") and not run.dry else [])]
    for backend in backends:
        for ratio, published in PUBLISHED.items():
            what = f"ratio {ratio or 'none'}, attention={backend}"
            if not run.fits(what, 0 if run.dry else 12):
                return

            def call(steps: int, ratio: float = ratio, backend: str = backend) -> None:
                module.infer(
                    PROMPT,
                    num_images_per_prompt=images,
                    num_inference_steps=steps,
                    tome={"ratio": ratio},
                    speed={"attention": backend},
                    show_progress=False,
                )

            with run.attempt(what):
                call(2)  # warm-up
                seconds = seconds_of(run, lambda: call(steps))[0]
                run.row(
                    what,
                    seconds_of_100_images=round(CALLS * seconds, 1),
                    measured=f"1 of {CALLS} calls",
                    published_rtx_3090=published,
                )
