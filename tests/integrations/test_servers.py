# SPDX-License-Identifier: Apache-2.0
"""Values through an inference server, over HTTP on the loopback: those of the model itself.

Mutations, each caught by the test named:
  log-probs one token early or late, in any style; choices not put in order       test_values_over_http
  spellings of one state counted to the next; mean for joint                      test_values_over_http
  special tokens at a response's end kept; V_K asked for                          test_same_requests_as_the_model
  an answer without numbers taken for 0                                           test_spoilt_answers
"""

import pytest
import torch
from helpers.logprob_server import serving
from helpers.rl import make_model, make_tokenizer

from sspo_ext.integrations.probing import values_before_steps
from sspo_ext.integrations.servers import LogprobServer
from sspo_ext.signals import (
    Branch,
    Probe,
    StepBatch,
    branch_logps,
    probe_requests,
    probe_step_values,
    values_from_logprobs,
)

ANSWERS = [["10", "a"], "2", ["0"], "abc"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def batch(tokenizer):
    texts = [("1+1=\n", ["1+1\n", "#2<eos>"]), ("2+1=\n", ["3<eos>"]), ("4+4=\n", []), ("a+b=\n", ["a\n", "b\n", "c"])]
    return StepBatch(
        [tokenizer(prompt).input_ids for prompt, _ in texts],
        [[tokenizer(step).input_ids for step in steps] for _, steps in texts],
    )


@pytest.mark.parametrize("style", ["echo", "vllm", "sglang"])
@pytest.mark.parametrize("reduce", ["joint", "mean"])
def test_values_over_http(batch, tokenizer, style, reduce):
    """Several spellings, several ends, states of all lengths, batches of 3 from two threads."""
    model, probe = make_model(), Probe("#", ends=("\n", ""))
    want = probe_step_values(model, batch, probe, ANSWERS, tokenizer=tokenizer, reduce=reduce)
    requests = probe_requests(batch, probe, ANSWERS, tokenizer=tokenizer, model=model, reduce=reduce)
    with serving(model, prefix_cache=True) as (url, _):
        server = LogprobServer(url, "policy" if style != "sglang" else "", style=style, batch_size=3, workers=2)
        found = server.logprobs(requests)
    got = values_from_logprobs(requests, found)
    torch.testing.assert_close(got.values, want.values, rtol=2e-5, atol=1e-9)
    assert torch.equal(got.offsets, want.offsets) and got.values.unique().numel() > 5
    # the log-probs themselves
    rows = list(zip(requests.prompts, requests.continuations, strict=True))
    own = branch_logps(
        model, [p for p, _ in rows], [Branch(i, len(p), c, 0) for i, (p, c) in enumerate(rows)], engine="separate"
    )
    flat = torch.tensor([x for some in found for x in some])
    apart = (flat - own.tokens).abs().max()
    print(f"{style}: log-probs apart by {apart:.2g}")
    assert apart < 2e-5


def test_prefix_cache_is_of_use(batch, tokenizer):
    """Requests come in an order in which neighbours share a prefix, so a cache computes fewer tokens."""
    model = make_model()
    requests = probe_requests(batch, "#", ANSWERS, tokenizer=tokenizer)
    computed, found = {}, {}
    for cache in (False, True):
        with serving(model, prefix_cache=cache) as (url, score):
            found[cache] = LogprobServer(url, batch_size=4, workers=1).logprobs(requests)
            computed[cache] = score.computed
            assert score.calls == len(requests)
    assert computed[False] == sum(map(len, requests.prompts)) + sum(map(len, requests.continuations))
    assert computed[True] < 0.6 * computed[False]
    for a, b in zip(found[False], found[True], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_same_requests_as_the_model(batch, tokenizer):
    """What adapters ask: nothing after the last step, with an engine as without one."""
    model = make_model()
    want = values_before_steps(model, batch, "#", ANSWERS, tokenizer=tokenizer)
    with serving(model) as (url, score):
        got = values_before_steps(model, batch, "#", ANSWERS, tokenizer=tokenizer, engine=LogprobServer(url))
        assert score.calls == 2 * 2 + 1 + 1 + 3
    torch.testing.assert_close(got.values, want.values, rtol=2e-5, atol=1e-9)
    assert [v[-1] for v in got.to_lists() if len(v) > 1] == [0.0, 0.0, 0.0]


def without_numbers(found):
    for choice in found["choices"]:
        choice["logprobs"]["token_logprobs"] = [None] * len(choice["logprobs"]["token_logprobs"])
    return found


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_numbers, ValueError, "expected 3 log-probs, a token each, got .null, null"),
        (lambda found: {"choices": []}, ValueError, "shorter|longer|argument"),
        (lambda found: {"error": "no"}, ValueError, "expected log-probs of the prompt in the answer, got .*error"),
        (lambda found: {"choices": [{**c, "logprobs": None} for c in found["choices"]]}, ValueError,
         "expected log-probs of the prompt"),
    ],
)  # fmt: skip
def test_spoilt_answers(batch, tokenizer, change, error, message):
    requests = probe_requests(batch, "#", ["10"] * 4, tokenizer=tokenizer)
    with serving(make_model(), change=change) as (url, _), pytest.raises(error, match=message):
        LogprobServer(url).logprobs(requests)


def test_refusals(batch, tokenizer):
    requests = probe_requests(batch, "#", ANSWERS, tokenizer=tokenizer)
    with serving(make_model()) as (url, _), pytest.raises(ConnectionError, match="400 .*unknown fields.*top_k"):
        LogprobServer(url, top_k=3).logprobs(requests)
    with pytest.raises(ConnectionError, match="^" + url):
        LogprobServer(url, timeout=5).logprobs(requests)  # it has stopped
    with pytest.raises(ValueError, match="^style: expected one of"):
        LogprobServer(url, style="openai")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: found[1:], "logprobs: expected those of 10 requests, got 9"),
        (lambda found: [found[0][1:], *found[1:]], "logprobs: expected 1 of request 0"),
        (lambda found: [[0.5], *found[1:]], "logprobs: expected numbers of at most 0, got 0.5"),
        (lambda found: [[float("nan")], *found[1:]], "logprobs: expected numbers of at most 0, got nan"),
        (lambda found: [[None], *found[1:]], "logprobs: expected numbers of at most 0, got None"),
    ],
)
def test_wrong_logprobs(batch, tokenizer, spoil, message):
    requests = probe_requests(batch, "#", [[[3]]] * 4, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"^{message}"):
        values_from_logprobs(requests, spoil([[-1.0]] * len(requests)))
