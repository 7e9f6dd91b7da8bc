"""Models: one file a family, named by its config's model_type; the equations they share are in decoder.py."""

from headrace.model.config import ModelConfig
from headrace.model.decoder import Model, describe_kv
from headrace.model.loading import ModelSettings, Rounding, load_model

__all__ = ["Model", "ModelConfig", "ModelSettings", "Rounding", "describe_kv", "load_model"]
