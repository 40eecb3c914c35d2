"""A stand-in for vLLM, with the calls that deploy.py and vllm_worker.py make of it: it says each
prompt backwards. Ids end with the first stop token; the log-probability of id n is -n / 100."""

import os
from pathlib import Path
from types import SimpleNamespace

import jinja2
import tokenizers


class SamplingParams:
    def __init__(self, max_tokens, temperature=1.0, seed=None, stop_token_ids=(), **more):
        self.max_tokens, self.stops = max_tokens, list(stop_token_ids)


class LLM:
    def __init__(self, model, seed, **arguments):
        if os.environ.get("STAND_IN_FAILS"):
            kind, _, text = os.environ["STAND_IN_FAILS"].partition(": ")
            raise {"ValueError": ValueError}[kind](text)
        self.model_config = SimpleNamespace(max_model_len=arguments.get("max_model_len", 512))
        self.told = " ".join(f"{key}={value}" for key, value in arguments.items())
        self.tokenizer = Tokenizer(Path(model))

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling, use_tqdm):
        if isinstance(prompts[0], dict):
            given = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
            pairs = zip(prompts, given, strict=True)
            return [self._ids(prompt["prompt_token_ids"], each) for prompt, each in pairs]
        return [self._output(text, self.tokenizer.encode(text), sampling) for text in prompts]

    def chat(self, conversations, sampling, use_tqdm, chat_template_kwargs=None):
        options = chat_template_kwargs or {}
        return [
            self._output(
                self.tokenizer.render(chat, options),
                self.tokenizer.apply_chat_template(chat, **options),
                sampling,
            )
            for chat in conversations
        ]

    def _ids(self, prompt, sampling):
        made = [*prompt[::-1], *sampling.stops[:1]][: sampling.max_tokens]
        ended = "stop" if made[-1] in sampling.stops else "length"
        scores = [None, *({n: SimpleNamespace(logprob=-n / 100)} for n in prompt[1:])]
        answer = SimpleNamespace(token_ids=made, finish_reason=ended)
        return SimpleNamespace(
            outputs=[answer], prompt_token_ids=prompt, prompt_logprobs=scores, text=""
        )

    def _output(self, prompt, ids, sampling):
        answer = SimpleNamespace(
            text=f"{prompt[::-1]} {self.told}",
            finish_reason="length" if sampling.max_tokens < len(prompt) else "stop",
            token_ids=list(range(sampling.max_tokens)),
        )
        return SimpleNamespace(outputs=[answer], prompt_token_ids=ids)


class Tokenizer:
    def __init__(self, folder):
        self.raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template = folder / "chat_template.jinja"

    def encode(self, text):
        return self.raw.encode(text).ids

    def render(self, chat, options):
        return jinja2.Template(self.template.read_text()).render(messages=chat, **options)

    def apply_chat_template(self, chat, **flags):
        return self.raw.encode(self.render(chat, flags), add_special_tokens=False).ids
