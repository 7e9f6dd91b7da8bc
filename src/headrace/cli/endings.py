"""Why an answer ended, for who reads it in pieces."""

from __future__ import annotations

from headrace.engine.deltas import Delta, DeltaReader
from headrace.engine.outputs import CompletionOutput, FinishReason


class EndingReader(DeltaReader):
    """A reader that remembers `finish_reason`, which is None until the output has ended."""

    finish_reason: FinishReason | None = None

    def read(self, output: CompletionOutput) -> Delta | None:
        self.finish_reason = output.finish_reason
        return super().read(output)
