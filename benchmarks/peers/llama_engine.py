"""llama.cpp through llama-cpp-python, for `lines.py`. Runs in its environment: imports nothing of this project."""

from __future__ import annotations

from itertools import islice

import llama_cpp


class Engine:
    """Greedy, on past the end of sequence, one prompt after the other; none is remembered for the next."""

    def __init__(self, *, model: str, context_length: int, num_threads: int) -> None:
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._llama = llama_cpp.Llama(
            model_path=model, n_ctx=context_length, n_threads=num_threads, n_threads_batch=num_threads, verbose=False
        )

    def answer(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], None]:
        answers = []
        for prompt in prompts:
            self._llama.reset()
            stream = self._llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
            answers.append(list(islice(stream, num_tokens)))
        return answers, None
