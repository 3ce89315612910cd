# SPDX-License-Identifier: Apache-2.0
"""SPO: advantages of segments by Monte Carlo, along a chain or in a tree, on the uncertain tokens alone.

Chain: a completion is cut before every fifth uncertain token, and each cut is completed a few times; a segment's
advantage is the difference of the values at its ends. Tree: the completion branches after every M tokens, and the value
of a node is the mean of its children's, so that nothing is sampled for values alone. In both only tokens that the old
policy gave less than 0.9 learn: `prob_threshold`.

Shows: completions sampled for an update, segments, the share of tokens that learn, and sampled accuracy on other
    problems before and after a few updates.

System: SPO-chain
Paper: arXiv 2505.23564
Changes: advantages of segments between cut points, V at the end - V at the start by Monte Carlo
Ours: sizes; three completions a cut

System: SPO-tree
Paper: arXiv 2505.23564
Changes: segments of a fixed length in a tree of samples; V of a node is the mean of its children
Ours: sizes; A = V of the child - V of the parent, as it stands
"""

import copy

import torch

from sspo_ext import step_logps, step_policy_loss
from sspo_ext.demo.play import Task, complete, load_start, policy_batch, score, sized, table

task = Task("sums")
start, tokenizer = load_start()
PROMPTS, UPDATES, M, WIDTHS = sized(16, 3), sized(8, 2), 12, (3, 3, 2)
held_out = task.problems(sized(120, 10), seed=2, held_out=True)


def ids_of(texts):
    return tokenizer(texts).input_ids


def graded(problems, texts):
    return torch.tensor([task.reward(p.prompt, text, p.answer) for p, text in zip(problems, texts, strict=True)])


def chain(model, problems, seed):
    """Per completion its segments and advantages; and how many completions were sampled."""
    texts = complete(model, tokenizer, [p.prompt for p in problems], seed=seed)
    batch = policy_batch(tokenizer, [p.prompt for p in problems], [[text] for text in texts])
    with torch.no_grad():
        tokens = step_logps(model(**batch["inputs"]).logits, batch["layout"]).tokens.exp()
    cut_texts, owners = [], []
    for i, (text, p) in enumerate(zip(texts, tokens.split(batch["layout"].counts.tolist()), strict=True)):
        uncertain = (p < 0.9).nonzero()[:, 0].tolist()
        words, cuts = text.split(" "), [0, *(c for c in uncertain[5::5] if c)]
        edges = [*dict.fromkeys(min(c, len(words) - 1) for c in cuts), len(words)]
        pieces = [" ".join(words[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        cut_texts.append([*(piece + " " for piece in pieces[:-1]), pieces[-1]])
        owners += [(i, "".join(cut_texts[i][:k])) for k in range(len(cut_texts[i]))]
    again = [(i, head) for i, head in owners for _ in range(3)]
    ends = complete(model, tokenizer, [problems[i].prompt + " " + head for i, head in again], seed=seed + 1)
    rewards = graded(
        [problems[i] for i, _ in again], [head + " " + end for (_, head), end in zip(again, ends, strict=True)]
    )
    values, outcome = rewards.view(-1, 3).mean(1).split([len(c) for c in cut_texts]), graded(problems, texts)
    advantages = [torch.cat([v[1:], r[None]]) - v for v, r in zip(values, outcome, strict=True)]
    return [p.prompt for p in problems], cut_texts, advantages, len(texts) + len(again)


def tree(model, problems, seed):
    """The same for every way from the root to a leaf; equal beginnings of ways are scored in each."""
    ways = [(p, []) for p in problems]
    for depth, width in enumerate(WIDTHS):
        ways = [way for way in ways for _ in range(width)]
        last = depth == len(WIDTHS) - 1
        open_ = [
            i for i, (_, parts) in enumerate(ways) if not parts or parts[-1].endswith("\n ") or parts[-1].endswith(" ")
        ]
        texts = complete(model, tokenizer, [ways[i][0].prompt + " " + "".join(ways[i][1]) for i in open_],
                         max_new_tokens=110 if last else M, seed=seed + depth)  # fmt: skip
        added = dict(zip(open_, texts, strict=True))
        ways = [(p, [*parts, added[i] if last or task.probe in added[i] else added[i].removesuffix("\n") + " "])
                if i in added else (p, [*parts, ""]) for i, (p, parts) in enumerate(ways)]  # fmt: skip
    values = [graded([p for p, _ in ways], ["".join(parts) for _, parts in ways]).view(len(problems), *WIDTHS)]
    for _ in WIDTHS:
        values.insert(0, values[0].mean(-1))
    spread = [
        v.reshape(*v.shape, *[1] * (len(WIDTHS) + 1 - v.dim())).expand(values[-1].shape).flatten() for v in values
    ]
    gains = torch.stack([child - parent for parent, child in zip(spread, spread[1:], strict=False)], 1)
    kept = [[k for k, part in enumerate(parts) if part.strip()] for _, parts in ways]
    return ([p.prompt for p, _ in ways], [[parts[k] for k in ks] for (_, parts), ks in zip(ways, kept, strict=True)],
            [gains[i, ks] for i, ks in enumerate(kept)], len(ways))  # fmt: skip


found = [{"": "start", "sampled for an update": "", "segments": "", "tokens that learn": "",
          **score(start, tokenizer, task, held_out)}]  # fmt: skip
for name, rollouts in (("SPO-chain", chain), ("SPO-tree", tree)):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(UPDATES):
        problems = task.problems(PROMPTS * (6 if rollouts is chain else 1), seed=100 + k, held_out=False)
        prompts, steps, advantages, count = rollouts(model, problems, seed=10 * k)
        batch = policy_batch(tokenizer, prompts, steps)
        with torch.no_grad():
            old = step_logps(model(**batch["inputs"]).logits, batch["layout"]).tokens
        out = step_policy_loss(
            model.train()(**batch["inputs"]).logits, batch["layout"], torch.cat(advantages), old=old, loss_type="ppo",
            prob_threshold=0.9,
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    learns = (old.exp() < 0.9).float().mean().item()
    numbers = {"sampled for an update": count, "segments": batch["layout"].num_steps, "tokens that learn": learns}
    found.append({"": name, **numbers, **score(model, tokenizer, task, held_out)})
print(table(found))
