"""
GPT-2, with three kinds of blocks: transformer blocks (T), memory blocks (M), n-gram blocks (N).

    block T:  x = x + Attn(LN1(x));  x = x + MLP(LN2(x))    Attn ends in the projection c_proj
    block M:  x = x + HML(heads(LN1(x)))                    heads: the same without c_proj (hml.py)
        or    x = x + HML(x + Attn(LN1(x)))                 with query="token", see MemoryBlock
    block N:  x = x + HIVE(slots of the last tokens)        no attention, no search

A config's `blocks` string says what stands where: "TMTTMT" is T M T T M T from bottom to top.
Parameters carry GPT-2's names (wte, wpe, h.N.attn.c_attn, ...), so that published weights map by
name. Shape names: see hml.py. [report]: known from accounts of the paper, not from its text;
[choice]: ours, where nothing is known.

In order: the config, attention, the blocks, GPT, and models in files. Not here: dropout,
positions other than learned ones, other norms, a cache of keys and values.
"""

import hashlib
import os
import zipfile
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import download, one_line, written_whole
from hml import HeadwiseMemory, NgramMemory


@dataclass
class GPTConfig:
    """Everything that fixes the shape of a model. Raises ValueError where it contradicts itself."""

    n_layer: int  # blocks of all kinds
    n_head: int
    n_embd: int
    block_size: int  # the longest sequence, in tokens
    vocab_size: int
    blocks: str = ""  # a letter of BLOCKS per block; "" means all T

    # The memory of M blocks: n, k, d_v in hml.py; the next three are explained at MemoryBlock. That
    # of N blocks has n * n slots, too, and the orders of its heads.
    n_keys: int = 128
    top_k: int = 16
    d_latent: int = 64
    query: str = "head"
    residual: bool = False
    key_scale: float = 1.0
    orders: tuple[int, ...] = (2, 3, 4, 5)

    new: tuple[int, ...] = ()  # indices, from 0, of the blocks that up-scaling inserted

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            sizes = f"{self.n_embd} and {self.n_head}"
            raise ValueError(f"n_embd must be a multiple of n_head; got {sizes}")

        # What stands where. A plain GPT is all T.
        self.blocks = self.blocks or "T" * self.n_layer
        if len(self.blocks) != self.n_layer or set(self.blocks) - set(BLOCKS):
            wanted = f"{self.n_layer} letters of {', '.join(BLOCKS)}, one per block"
            raise ValueError(f"blocks must be {wanted}, not {self.blocks!r}")
        if self.query not in ("head", "token", "recent"):
            raise ValueError(f"query must be head, token or recent, not {self.query!r}")
        if self.residual and self.query != "token":
            raise ValueError("residual needs query token: the head query has no output projection")


# ---- Blocks --------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head causal attention. x (B, T, C) -> (B, T, C), or with its heads apart.

    project: GPT-2's form, in which c_proj mixes the heads' outputs. Without it there is no c_proj,
    and attention ends in (B, T, H, d_h): what a memory block asks its memory with.
    """

    def __init__(self, config: GPTConfig, project: bool = True):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # Q, K and V in one
        self.project = project
        if project:
            self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        # One product makes queries, keys and values of all heads.
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, d_h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, d_h)
        if q.device.type == "mps":  # on views the result was wrong (PyTorch issue 163597)
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()

        # On a CPU in fp32, even under autocast: there the backward in bf16 is up to three times
        # slower.
        if q.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                wide = torch.promote_types(q.dtype, torch.float32)
                heads = F.scaled_dot_product_attention(
                    q.to(wide), k.to(wide), v.to(wide), is_causal=True
                ).to(q.dtype)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)

        heads = heads.transpose(1, 2)  # (B, H, T, d_h) -> (B, T, H, d_h)
        if not self.project:
            return heads
        return self.c_proj(heads.flatten(2))  # (B, T, H, d_h) -> (B, T, C)


class MLP(nn.Module):
    """GPT-2's feed-forward layer. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # the form that GPT-2 was trained with
        return self.c_proj(x)


# Every block is called with the stream x (B, T, C) and the tokens (B, T) that it belongs to, and
# returns the stream for the next block. These two do not need the tokens; one of yours may.
class TransformerBlock(nn.Module):
    """GPT-2's block: x + attention, then x + MLP, each on a normalised input. (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        # First between tokens, then within each token.
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class RecentTokens(nn.Module):
    """A query that knows the last few tokens: W (sum over j of w_j * x_{t-j}), split by head.

    x (B, T, C) -> (B, T, H, d_h). w_j is a weight for each of the C features: a causal convolution.
    """

    def __init__(self, config: GPTConfig, reach: int = 4):
        super().__init__()
        self.n_head = config.n_head
        self.mix = nn.Parameter(torch.randn(reach, config.n_embd) * reach**-0.5)
        self.own_query = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        T = x.size(1)
        padded = F.pad(x, (0, 0, len(self.mix) - 1, 0))  # (B, reach - 1 + T, C)
        mixed = 0
        for back, weight in enumerate(self.mix):
            start = len(self.mix) - 1 - back
            mixed = mixed + weight * padded[:, start : start + T]  # (B, T, C)
        return self.own_query(mixed).unflatten(-1, (self.n_head, -1))  # (B, T, H, d_h)


class MemoryBlock(nn.Module):
    """MIDUS's block: attention, then the memory, and no MLP. (B, T, C).

    query: what a head asks its memory with.
        head    its own output of attention, which stops before c_proj; so accounts of the paper
                describe the block [report]
        token   its slice of x + Attn(LN(x)), c_proj and all, so that the query knows the token
                itself; one account can be read so [report]
        recent  its slice of W (a mix of LN(x) of the last four tokens, weights learned); there is
                no attention then [choice]
    residual: whether Attn(LN(x)) is added to x beside the memory, as in a transformer block; needs
        query token. The block is then a copied one whose MLP is replaced by a memory. Without it
        attention reaches the sum only through the memory; a way around would weaken what retrieval
        has to learn [report].
    key_scale: the keys start so many times larger, which makes the weights of a read less alike.

    An empty bank adds zeros. So the block starts by passing x on; with residual it does if c_proj
    starts at zero as well, which upscale.py sees to.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        # Names as in TransformerBlock, so that LN, Q, K and V (and c_proj) can be copied from one.
        self.query = config.query
        self.residual = config.residual
        self.ln_1 = nn.LayerNorm(config.n_embd)
        if config.query == "recent":
            self.recent = RecentTokens(config)
        else:
            self.attn = Attention(config, project=config.query == "token")
        self.memory = HeadwiseMemory(
            n_head=config.n_head,
            head_dim=config.n_embd // config.n_head,
            n_keys=config.n_keys,
            top_k=config.top_k,
            d_latent=config.d_latent,
        )
        with torch.no_grad():
            self.memory.product_keys.keys.mul_(config.key_scale)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.query == "recent":
            return x + self.memory(self.recent(self.ln_1(x)))
        attended = self.attn(self.ln_1(x))  # head: (B, T, H, d_h); token: (B, T, C)
        if self.query == "head":
            return x + self.memory(attended)

        # The stream after attention, cut into a slice for each head.
        after = x + attended
        query = after.unflatten(-1, (self.memory.n_head, -1))  # (B, T, C) -> (B, T, H, d_h)
        return (after if self.residual else x) + self.memory(query)


class NgramBlock(nn.Module):
    """x + a memory whose slots the last tokens name, see NgramMemory. (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_embd // config.n_head
        sizes = (config.n_keys**2, config.d_latent, config.orders)
        self.memory = NgramMemory(config.n_head, width, *sizes)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x + self.memory(tokens)


# ---- The model -----------------------------------------------------------------------------------
# The letters of a config's `blocks`. A block of your own takes the config, and a letter here.
BLOCKS = {"T": TransformerBlock, "M": MemoryBlock, "N": NgramBlock}


class GPT(nn.Module):
    """A stack of blocks between token embeddings and an output layer that shares their weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config

        # An embedding per token, which is the output layer's weight too, and one per position.
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(BLOCKS[kind](config) for kind in config.blocks)
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self) -> None:
        """Weights of a model that is trained from scratch. The memory starts as hml.py says."""
        # GPT-2 starts at std 0.02, for its width of 768. Kept in proportion to C^-0.5 [choice],
        # narrow models learn to attend several times sooner. What writes to the residual stream
        # starts smaller, the more so the more blocks there are.
        std = 0.02 * (768 / self.config.n_embd) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith("c_proj")
                scale = (2 * self.config.n_layer) ** -0.5 if writes else 1.0
                nn.init.normal_(module.weight, std=std * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab); with targets (B, T) the mean loss, in nats.

        Raises ValueError if the sequence is longer than block_size.
        """
        T = tokens.size(1)
        if T > self.config.block_size:
            longest = self.config.block_size
            raise ValueError(f"a sequence of {T} tokens is longer than the model's {longest}")

        # Up the stack: every block adds to what runs past it.
        positions = torch.arange(T, device=tokens.device)  # (T,)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x, tokens)  # (B, T, C)
        x = self.ln_f(x)

        # A token's logit is the dot product of its embedding with the stack's output. The loss is
        # taken in fp32, whatever the logits were computed in.
        logits = F.linear(x, self.wte.weight)  # (B, T, vocab)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Continues tokens (B, T >= 1) by max_new_tokens; returns both.

        temperature 0 takes the likeliest token; else one of the top_k likeliest is drawn.
        """
        for _ in range(max_new_tokens):
            # The model reads as much of the end as it can.
            logits = self(tokens[:, -self.config.block_size :])[:, -1].float()  # (B, vocab)

            if temperature == 0:
                next_token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                if top_k is not None:
                    best = logits.topk(min(top_k, logits.size(-1))).values  # (B, top_k)
                    logits = logits.masked_fill(logits < best[:, -1:], float("-inf"))
                probabilities = (logits / temperature).softmax(dim=-1)  # (B, vocab)
                next_token = torch.multinomial(probabilities, 1)  # (B, 1)
            tokens = torch.cat((tokens, next_token), dim=1)
        return tokens


def count_parameters(model: GPT, blocks: tuple[int, ...] | None = None) -> dict[str, int]:
    """Parameters by part, zero parts left out; of the blocks at these indices only, if given.

    A parameter that several blocks share counts once.
    """
    parts = (  # the first of these fragments in a parameter's name says its part
        ("product_keys", "keys"),
        ("hive.bank", "bank"),
        ("hive.proj", "projections"),
        (".attn.", "attention"),
        (".ln_1.", "attention"),
        (".mlp.", "mlp"),
        (".ln_2.", "mlp"),
        ("h.", "other"),
        ("", "embeddings"),  # and ln_f
    )
    counts = {}
    for name, parameter in model.named_parameters():
        # h.3.attn.c_attn.weight belongs to block 3.
        block = int(name.split(".")[1]) if name.startswith("h.") else None
        if blocks is None or block in blocks:
            part = next(part for fragment, part in parts if fragment in name)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def weights_sha256(model: GPT) -> str:
    """A hash that names a model by its weights; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- Models in files -----------------------------------------------------------------------------
def save_checkpoint(path: str, model: GPT, **info) -> None:
    """Writes config, weights and `info` (plain types and tensors only), whole or not at all.

    Raises ValueError for a model that could not be loaded again.
    """
    # What load_checkpoint will make from the config must have the same parameters.
    with torch.device("meta"):
        twin = GPT(model.config)
    ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model, twin))
    if ours != theirs:
        names = ", ".join(
            sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        )
        raise ValueError(
            f"this model's config does not rebuild it ({names[:200]}): a block of your own needs a "
            "letter in BLOCKS, and no two blocks may share a parameter"
        )
    content = {"config": asdict(model.config), "model": model.state_dict(), **info}
    with written_whole(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str) -> tuple[GPT, dict]:
    """The model on the CPU, in fp32, and the info that save_checkpoint was given.

    Raises ValueError for a file that is damaged or holds something else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        # A torch file is a zip, with a checksum for each of its members that torch does not check.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        info = torch.load(path, map_location="cpu", weights_only=True)

        # The model is made without memory for its weights: those of the file become its own.
        with torch.device("meta"):
            model = GPT(GPTConfig(**info.pop("config")))
        model.load_state_dict(info.pop("model"), assign=True)
    except Exception as error:  # zipfile, torch and GPT raise many kinds
        reason = one_line(error)
        raise ValueError(f"{path} is damaged or is no nanoMIDUS checkpoint: {reason}") from error
    return model.float(), info


GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
GPT2_SHA256 = {  # of the larger sizes none is known: those downloads are not verified
    "gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421",
}
PRETRAINED = {  # OpenAI's four sizes
    "gpt2": GPTConfig(12, 12, 768, 1024, 50257),  # 124M parameters
    "gpt2-medium": GPTConfig(24, 16, 1024, 1024, 50257),  # 355M
    "gpt2-large": GPTConfig(36, 20, 1280, 1024, 50257),  # 774M
    "gpt2-xl": GPTConfig(48, 25, 1600, 1024, 50257),  # 1558M
}


def load_gpt2(path: str) -> GPT:
    """GPT-2 from a file in OpenAI's layout, heads 64 wide. Raises ValueError for anything else.

    The prefix `transformer.`, an lm_head (tied to wte) and attention masks do not matter.
    """
    # What files of others hold besides, and what they store the other way round.
    ignored = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    try:
        # Names and layouts become ours.
        state = {}
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            name = name.removeprefix("transformer.")
            if not name.endswith(ignored):
                state[name] = tensor.T if name.endswith(transposed) else tensor

        # The sizes of the model are those of its tensors.
        vocab_size, n_embd = state["wte.weight"].shape
        block_size = len(state["wpe.weight"])
        n_layer = len({name.split(".")[1] for name in state if name.startswith("h.")})
        if n_embd % 64:
            raise ValueError(f"its width, {n_embd}, is no multiple of GPT-2's head width, 64")
        model = GPT(GPTConfig(n_layer, n_embd // 64, n_embd, block_size, vocab_size))
        model.load_state_dict(state)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} does not hold GPT-2 weights: {one_line(error)}") from error
    return model


def open_model(name: str, data_dir: str = "data") -> tuple[GPT, dict]:
    """A GPT-2 by name, a .bin file in its layout, or one of our checkpoints; and its info.

    GPT-2 is downloaded once, into data_dir. Raises ValueError for what is no model, OSError if the
    download fails.
    """
    # Published weights, by name or from a file of your own.
    if name in PRETRAINED:
        path = os.path.join(data_dir, f"{name}.bin")
        hint = f"A file of your own in that layout can be named instead of {name}, as FILE.bin."
        download([GPT2_URL.format(name)], path, sha256=GPT2_SHA256.get(name), hint=hint)
        return load_gpt2(path), {"tokenizer": "gpt2"}
    if name.endswith(".bin"):
        return load_gpt2(name), {"tokenizer": "gpt2"}

    return load_checkpoint(name)
