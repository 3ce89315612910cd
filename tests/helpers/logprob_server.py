# SPDX-License-Identifier: Apache-2.0
"""A stand-in for an inference server, on the loopback: a local model, three ways to ask it, and a prefix cache."""

import contextlib
import threading

import torch

from sspo_ext.hf.cache import cache_input, cache_of

from .json_server import json_server

FIELDS = {
    "/v1/completions": {"model", "prompt", "max_tokens", "echo", "logprobs", "prompt_logprobs", "temperature"},
    "/generate": {"input_ids", "sampling_params", "return_logprob", "logprob_start_len"},
}


class Scorer:
    """Log-probs of every token of a text; with a cache, of what the text before did not share."""

    def __init__(self, model, prefix_cache):
        self.model, self.prefix_cache = model.eval(), prefix_cache
        self.ids, self.logprobs, self.cache = [], [], None
        self.computed = self.calls = 0
        self.lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, ids):
        with self.lock:
            same = 0
            if self.prefix_cache:
                pairs = zip(ids[:-1], self.ids, strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids) - 1, len(self.ids)))
            start = max(same - 1, 0)  # the logits of the last shared token are needed
            if start and start < len(self.ids):
                self.cache.crop(start - len(self.ids))
            past = cache_input(self.model, self.cache) if self.prefix_cache and start else {}
            out = self.model(torch.tensor([ids[start:]]), use_cache=self.prefix_cache, **past)
            logp = torch.log_softmax(out.logits[0].double(), -1)
            new = logp[:-1].gather(1, torch.tensor(ids[start + 1 :])[:, None])[:, 0].tolist()
            found = [*self.logprobs[: start + 1], *new] if start else [None, *new]
            self.ids, self.logprobs, self.cache = list(ids), found, cache_of(out)
            self.computed += len(ids) - start
            self.calls += 1
            return found


def answer(path, body, score):
    """The JSON of a server's answer, in the form of the way in which it was asked."""
    unknown = set(body) - FIELDS[path]
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    if path == "/generate":
        assert body["return_logprob"] and body["sampling_params"]["max_new_tokens"] == 0
        starts = body["logprob_start_len"]
        return [
            {"meta_info": {"input_token_logprobs": [
                [None if t == start else x, i, None]
                for t, (x, i) in enumerate(zip(score(ids), ids, strict=True)) if t >= start
            ]}}
            for ids, start in zip(body["input_ids"], starts, strict=True)
        ]  # fmt: skip
    choices = []
    for index, ids in enumerate(body["prompt"]):
        found = score(ids)
        choice = {"index": index, "text": "", "logprobs": None}
        if body.get("echo"):
            assert body["max_tokens"] == 0 and body["logprobs"] >= 0
            choice["logprobs"] = {"token_logprobs": found, "tokens": [str(i) for i in ids]}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [
                None if x is None else {"3": {"logprob": -0.5, "rank": 1}, str(i): {"logprob": x, "rank": 2}}
                for x, i in zip(found, ids, strict=True)
            ]
        choices.append(choice)
    return {"object": "text_completion", "choices": choices[::-1]}  # in any order: they have their numbers


@contextlib.contextmanager
def serving(model, *, prefix_cache=False, change=lambda found: found):
    """(url, Scorer) of a server that runs meanwhile; `change` spoils its answers."""
    score = Scorer(model, prefix_cache)

    def respond(path, body):
        try:
            return 200, change(answer(path, body, score))
        except (KeyError, ValueError) as error:
            return 400, {"error": str(error)}

    with json_server(respond) as url:
        yield url, score
