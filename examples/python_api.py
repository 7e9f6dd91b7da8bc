"""The Python API in one file: generate, chat, stream, score, report. Run: `.venv/bin/python examples/python_api.py`."""

from __future__ import annotations

from headrace import LLM, Constraint, SamplingParams


def main() -> None:
    with LLM() as llm:
        print("generate")
        prompts = ["The capital of France is", "Water boils at", "A headrace is a channel that"]
        for output in llm.generate(prompts, SamplingParams(max_tokens=16)):
            print(f"  {output.prompt}{output.outputs[0].text!r}")

        print("chat, four drawn answers from one prefill")
        question = [{"role": "user", "content": "Name a river in Europe."}]
        params = SamplingParams(n=4, temperature=0.8, seed=7, max_tokens=12)
        for answer in llm.chat(question, params)[0].outputs:
            print(f"  {answer.index}: {answer.text!r} ({answer.finish_reason})")

        print("an answer that must be one of three")
        mood = Constraint("choice", '["positive", "negative", "mixed"]')
        review = [
            {"role": "user", "content": "Is this review positive, negative or mixed? It leaked on the first day."}
        ]
        print(f"  {llm.chat(review, SamplingParams(max_tokens=8, constraint=mood))[0].outputs[0].text}")

        print("stream: answers as they finish")
        lengths = [SamplingParams(max_tokens=count) for count in (24, 4, 12)]
        for output in llm.stream(prompts, lengths):
            print(f"  prompt {output.request_id}: {len(output.outputs[0].token_ids)} tokens")

        print("score: how expected is a text")
        for score in llm.score(["The sun rises in the east.", "The sun rises in the teapot."]):
            print(f"  {score.text!r}: perplexity {score.perplexity:.1f}")

        report = llm.report()
        print(f"{report['output_tokens']} output tokens, {report['cached_prompt_tokens']} prompt tokens from the cache")


if __name__ == "__main__":
    main()
