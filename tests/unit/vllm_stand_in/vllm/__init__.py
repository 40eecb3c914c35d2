"""A stand-in for vLLM, with the calls that deploy.py makes of it: it says each prompt backwards."""

import os
from pathlib import Path
from types import SimpleNamespace

import jinja2
import tokenizers


class SamplingParams:
    def __init__(self, temperature, max_tokens, seed):
        self.max_tokens = max_tokens


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
