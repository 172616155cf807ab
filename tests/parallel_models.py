"""What the ranks of the pool do with models of transformers."""

from __future__ import annotations

import torch
import torch.distributed as dist
import transformers
from parallel_work import context
from torch.utils.checkpoint import checkpoint

from attn_core import CallRefused
from attn_core.integrations.transformers import attention_forward, register
from attn_core.parallel import communication, use_parallel

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, sliding_window=5, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, final_logit_softcapping=20.0
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"]
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    ),
}
LENGTH = 22


def model_of(kind):
    register(backend="native_math")
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config._attn_implementation = "attn"
    made = transformers.BertModel if kind == "bert" else transformers.AutoModelForCausalLM.from_config
    return made(config).double().eval()


def tokens(batch, seed=1):
    return torch.randint(2, 61, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding(where):
    """(B, S): rows with more and more of padding, on one side or on both; or "dense", every row and column of a mask."""
    if where == "dense":
        seen = torch.rand(3, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3
        return seen.logical_or(torch.eye(LENGTH, dtype=torch.bool)).tril()
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row in range(1, 3):
        if where in ("left", "both"):
            mask[row, : row * 5] = 0
        if where in ("right", "both"):
            mask[row, -row * 4 :] = 0
    return mask


def outputs(model, **inputs):
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def all_gradients(model):
    """Those of all parameters, in one tensor."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def forward(kind, shape, order, padded, starts, checkpointed=False, described=False):
    """The largest differences of the outputs and of the parameters' gradients from those of one rank."""
    cp = context(shape, order)
    model = model_of(kind)
    ids = tokens(1 if starts else 3)
    mask = padding(padded) if padded else None
    real = torch.ones_like(ids, dtype=torch.bool) if padded in (None, "dense") else mask.bool()
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    positions = torch.arange(LENGTH)[None].expand(len(ids), -1)
    if starts:
        positions = torch.cat([torch.arange(n) for n in starts])[None]
    options = {"use_cache": False} if starts else {}
    weights = torch.randn(*ids.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * real
    wanted = outputs(model, input_ids=ids, attention_mask=mask, position_ids=positions, **options)
    (wanted.sum(-1) * weights).sum().backward()
    gradients = all_gradients(model)
    model.zero_grad()
    parts = [cp.shard(item) for item in (ids, positions, real, weights)]
    mask = mask if mask is None else cp.shard(mask, dim=2 if mask.ndim == 4 else 1)
    if described:
        ends = torch.tensor([0, *starts]).cumsum(0).to(torch.int32)
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    with use_parallel(cp):
        found = outputs(model, input_ids=parts[0], attention_mask=mask, position_ids=parts[1], **options)
    (found.sum(-1) * parts[3]).sum().backward()  # outside: what the backward needs is known
    summed = summed_over(cp, all_gradients(model))
    difference = (found - cp.shard(wanted.detach()))[parts[2]].abs()
    return [difference.max().item() if difference.numel() else 0.0, (summed - gradients).abs().max().item()]


def recomputed(shape, reentrant, mask):
    """The largest difference of a layer's gradient where its backward runs after the scope has ended, or what is raised.

    It has no mask of transformers, which would know the ranks: none at all, or the user's own, of all columns.
    """
    cp = context(shape)
    module = torch.nn.Identity()
    module.is_causal = False
    torch.manual_seed(5)
    whole, grad = (torch.randn(2, 2, LENGTH, 8, dtype=torch.float64) for _ in range(2))
    whole.requires_grad_()
    seen = padding("dense")[:1] if mask else None

    def layer(x, mask):
        return attention_forward(module, x, x, x, mask, backend="native_math")[0].transpose(1, 2)

    (wanted,) = torch.autograd.grad(layer(whole, seen), whole, grad)
    part = cp.shard(whole.detach(), dim=2).requires_grad_()
    rows = None if seen is None else cp.shard(seen, dim=2)
    with use_parallel(cp):
        out = checkpoint(layer, part, rows, use_reentrant=reentrant)
    try:
        out.backward(cp.shard(grad, dim=2))
    except CallRefused as error:
        return str(error)
    return (part.grad - cp.shard(wanted, dim=2)).abs().max().item()


def summed_over(cp, tensor):
    """Sum in place over all ranks of cp."""
    for name in ("ring", "ulysses"):
        if cp.group(name) is not None:
            dist.all_reduce(tensor, group=cp.group(name))
    return tensor


def trained(shape, order, steps):
    """Losses of so many steps, and the largest difference of the parameters after them, from those of one rank."""
    cp = context(shape, order)
    together, alone = model_of("llama").train(), model_of("llama").train()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9) for model in (together, alone)]
    losses = []
    for step in range(steps):
        ids = tokens(2, seed=step)
        shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        count = int((shifted != -100).sum())
        wanted = alone(input_ids=ids, labels=ids, num_items_in_batch=count).loss
        part, labels = cp.shard(ids), cp.shard(shifted)
        with use_parallel(cp):
            found = together(
                input_ids=part, labels=part, shift_labels=labels, num_items_in_batch=count,
                position_ids=cp.positions()[None],
            ).loss  # fmt: skip
            found.backward()
        wanted.backward()
        for parameter in together.parameters():
            summed_over(cp, parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append((summed_over(cp, found.detach().clone()).item(), wanted.item()))
    pairs = zip(together.parameters(), alone.parameters(), strict=True)
    return losses, max((one - other).abs().max().item() for one, other in pairs)


def compiled(shape, fullgraph):
    """What a compiled model gives inside a scope: the largest difference from one rank, or what is raised."""
    cp = context(shape)
    model = model_of("llama")
    ids = tokens(2)
    torch._dynamo.reset()
    made = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    found = []
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        for _ in range(2):
            alone = made(input_ids=ids, use_cache=False).logits  # before and after, outside of it
            assert torch.allclose(alone, wanted)
            try:
                with use_parallel(cp):
                    part = made(input_ids=cp.shard(ids), position_ids=cp.positions()[None], use_cache=False).logits
                found.append((part - cp.shard(wanted)).abs().max().item())
            except Exception as error:  # noqa: BLE001 - it is what the test asks for
                found.append(str(error))
    return found


def refused(kind, shape, order, how):
    """What a forward raises on this rank that is not one of a whole sequence."""
    cp = context(shape, order)
    model = model_of(kind)
    ids = tokens(2 if how == "packed batch" else 1)
    part = cp.shard(ids)
    positions = cp.positions()[None]
    inputs = {"input_ids": part, "position_ids": positions}
    if how == "no positions":
        del inputs["position_ids"]
    elif how == "packed batch":
        starts = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
        inputs |= {"position_ids": cp.shard(starts), "use_cache": False}
    elif how == "a document each":
        inputs |= {"position_ids": torch.arange(part.shape[1])[None], "use_cache": False}
    elif how == "offsets of a part":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 4, part.shape[1]], dtype=torch.int32)
    elif how == "offsets and no positions":
        offsets = torch.tensor([0, 9, LENGTH], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": offsets, "position_ids": torch.arange(part.shape[1])[None]}
    elif how == "packed in a cache":
        inputs["position_ids"] = cp.shard(torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None])
    elif how == "whole padding":
        inputs["attention_mask"] = torch.ones_like(ids)
    elif how == "local mask":
        inputs["attention_mask"] = torch.ones(1, 1, part.shape[1], part.shape[1], dtype=torch.bool).tril()
    elif how == "padding and documents":
        offsets = torch.tensor([0, 9, LENGTH], dtype=torch.int32)
        inputs |= {"attention_mask": cp.shard(padding("left")[1:2]), "cu_seq_lens_q": offsets}
    elif how == "different batches" and dist.get_rank() == 1:
        inputs |= {"input_ids": part.expand(2, -1)}
    communication.sent.clear()
    with use_parallel(cp):
        try:
            if how == "generate":
                model.generate(input_ids=part, max_new_tokens=3, do_sample=False, pad_token_id=0)
            elif how == "static cache":
                cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
                model(**inputs, past_key_values=cache)
            else:
                model(**inputs)
        except Exception as error:  # noqa: BLE001 - it is what the test asks for
            return type(error).__name__, str(error)
    return None, ""
