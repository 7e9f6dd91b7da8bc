"""A Hugging Face folder as a checkpoint: config.json, safetensors (sharded or not), tokenizer.json. Never pickle."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken

from headrace.checkpoint.base import Blocks
from headrace.checkpoint.hashes import hash_files
from headrace.checkpoint.tokenizer import Tokenizer
from headrace.core import ModelError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
DTYPES = {"F32", "F16", "BF16"}
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Multimodal Gemma 3 wraps its text model; newer and older files nest its tensors differently.
WRAPPED = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
# Google's multimodal config.json leaves out what equals these defaults of Hugging Face's Gemma3TextConfig.
GEMMA3_TEXT = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors. Opening it checks that all shards are there and whole."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError naming the file that is missing, damaged or refused."""
        self.path = path
        self._files = find_weight_files(path)
        self.config = unwrap_config(read_json(path / "config.json", "a model folder needs its config.json"))
        self.nbytes = sum(file.stat().st_size for file in self._files)
        self._places = self._find_tensors()

    @cached_property
    def _shards(self) -> dict[Path, Any]:
        return {file: open_shard(file) for file in self._files}

    def _find_tensors(self) -> dict[str, tuple[Path, str]]:
        """Where each tensor is: its shard and its name there. Tensors of a vision part are left out."""
        stored = {name: file for file, shard in self._shards.items() for name in shard.keys()}  # noqa: SIM118
        wrapped = any(name.startswith(tuple(WRAPPED)) for name in stored)
        places: dict[str, tuple[Path, str]] = {}
        for name, file in stored.items():
            prefix = next((prefix for prefix in WRAPPED if name.startswith(prefix)), None)
            if prefix is not None:
                places[WRAPPED[prefix] + name.removeprefix(prefix)] = (file, name)
            elif not wrapped or name.startswith("lm_head."):
                places[name] = (file, name)
        if "embed_tokens.weight" in places and "model.embed_tokens.weight" not in places:
            # Saved from the model without its head, as embedding models are: only the head is outside "model.".
            places = {name if name.startswith("lm_head.") else f"model.{name}": each for name, each in places.items()}
        return places

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._places:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; fetch the folder again")
        file, stored = self._places[name]
        dtype = self._shards[file].get_slice(stored).get_dtype()
        if dtype not in DTYPES:
            right = ", ".join(sorted(DTYPES))
            raise ModelError(f"{file}: tensor {stored!r} has unsupported type {dtype}; use a checkpoint in {right}")
        tensor: torch.Tensor = self._shards[file].get_tensor(stored)
        return tensor

    def blocks(self, name: str) -> Blocks | None:
        return None

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path}: missing; save the model's fast tokenizer there (transformers: AutoTokenizer, save_pretrained)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: not a tokenizer that can be read: {error}; fetch the file again") from error
        settings = read_optional_json(self.path / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            # Older files keep apart what newer ones have here; what they say comes first, as in transformers.
            settings = settings | read_optional_json(self.path / "special_tokens_map.json")
        special = {name: text for name in SPECIAL_NAMES if (text := read_token(settings.get(name))) is not None}
        add_tokens(backend, list_added_tokens(self.path, settings, set(special.values())), self.path)
        return Tokenizer(backend, self._find_end_tokens(backend, special), self._read_template(settings), special)

    def hash(self) -> str:
        return hash_files(self._files)

    def _find_end_tokens(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> set[int]:
        """The tokenizer's end token and those of generation_config.json or, where that has none, of config.json."""
        named = read_optional_json(self.path / "generation_config.json").get("eos_token_id")
        if named is None:
            named = self.config.get("eos_token_id")
        found = named if isinstance(named, list) else [named]
        if not all(token is None or isinstance(token, int) for token in found):
            raise ModelError(f"{self.path}: eos_token_id must be a token's number or a list of them, found {named!r}")
        if "eos_token" in special:
            found = [*found, backend.token_to_id(special["eos_token"])]
        return {token for token in found if token is not None}

    def _read_template(self, settings: dict[str, Any]) -> str | None:
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return file.read_text("utf-8")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError naming the file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; {why}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}; fetch the file again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(found).__name__}; fetch the file again")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, "") if path.exists() else {}


def read_token(value: Any) -> str | None:
    """A special token's text, which older files wrap in a dictionary."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def list_added_tokens(folder: Path, settings: dict[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Tokens with their numbers that a folder names outside tokenizer.json. Raises ModelError for a damaged list."""
    named = settings.get("added_tokens_decoder")
    if named is None:
        added = read_optional_json(folder / "added_tokens.json")
        named = {number: {"content": text, "special": text in special} for text, number in added.items()}
    try:
        return {int(number): AddedToken(**fields) for number, fields in named.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: its list of added tokens is damaged ({error}); fetch the folder again") from error


def add_tokens(backend: tokenizers.Tokenizer, added: dict[int, AddedToken], folder: Path) -> None:
    """Make one token each of those that the backend would cut up. Raises ModelError where their numbers do not fit."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token in sorted(added.items(), key=lambda each: each[0]):
        if token.content not in known:
            backend.add_tokens([token])
            found = backend.token_to_id(token.content)
            if found != number:
                raise ModelError(
                    f"{folder}: token {token.content!r} has number {number}, and after tokenizer.json it would be "
                    f"{found}; save the tokenizer again (transformers: AutoTokenizer, save_pretrained)"
                )


def unwrap_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's config out of a multimodal Gemma 3 one; any other config as it is."""
    inner = config.get("text_config")
    if not isinstance(inner, dict) or "gemma3" not in str(config.get("model_type")):
        return config
    rope = {} if "rope_parameters" in inner else {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}
    outer = {name: config[name] for name in ("eos_token_id", "bos_token_id", "tie_word_embeddings") if name in config}
    return GEMMA3_TEXT | rope | outer | inner | {"model_type": "gemma3_text"}


def find_weight_files(path: Path) -> list[Path]:
    """The safetensors files that the model consists of, in order. Raises ModelError if one is missing, or all are."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index, "").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index}: names no weight files (weight_map); fetch the file again")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ModelError(f"{index}: names the weight file {name!r}, which is missing; fetch it into {path}")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(f"{path / pickles[0]}: pickle checkpoint refused, it can run code; use safetensors")
    raise ModelError(f"{path}: no model.safetensors here; give a Hugging Face folder with safetensors or a .gguf file")


def open_shard(file: Path) -> Any:
    """The safetensors library's handle, which has checked that the header and the file's length agree."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: truncated or damaged safetensors file ({error}); fetch the file again") from error
