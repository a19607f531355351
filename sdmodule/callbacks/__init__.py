"""Lightning callbacks for training and sampling, one per file."""

from __future__ import annotations

from typing import Any

from sdmodule.io.lazy import lazy_attribute

MODULES = {
    "CastFrozenWeights": "frozen_weights",
    "ClassImages": "class_images",
    "CudnnBenchmark": "cudnn_benchmark",
    "EMA": "ema",
    "Export": "export",
    "HTMLReport": "html_report",
    "ImageLogger": "image_logger",
    "LatentCache": "latent_cache",
    "NonFiniteLoss": "finite_loss",
    "PredictionWriter": "prediction_writer",
    "ProgressBar": "progress",
    "QualityMetrics": "metrics",
    "TimingLogger": "timing",
    "TrainingCheckpoint": "checkpoint",
    "TrainingReport": "training_report",
    "ValidationInterval": "validation_interval",
    "ValidationSamples": "validation_samples",
}

__all__ = [*MODULES]


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, MODULES, name)


def __dir__() -> list[str]:
    return __all__
