"""Multi-head attention: a block is a set of heads with the inputs that it reads and the outputs that it writes.

`torch.nn.MultiheadAttention` is known by its type. A module written by hand is recognised by what it does: a trace shows its
projections, and a trial on random weights shows that it is plain attention, and with how many heads.

Shape letters: `N` sequences, `T` tokens, `D` width, `K` key and value heads (the units), `R` query heads to each of them, `E` width of
a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradloc.core.layout import DependencyLayout
from gradloc.core.operators import LayerParameter, OperatorChain
from gradloc.core.plan import ChainPlan
from gradloc.core.standard_layouts import plain_layout
from gradloc.errors import UnsupportedError
from gradloc.route.inputs import one_input
from gradloc.route.kinds import Draw, OperatorKind, Tensors, computes, register_kind
from gradloc.route.operator import RoutedOperator
from gradloc.route.patterns import own_graph

LONGEST = 64
"""Tokens of the longest sequence that is tried."""


class RoutedAttention(RoutedOperator):
    """Self-attention ``[N, T, D]`` to ``[N, T, D']`` whose projections run as blocks of heads.

    Every block's heads read its own inputs and write its own outputs; isolated heads are gone. All heads that are left attend in one
    call, whatever their block.

    Args:
        plan, tensors: see `RoutedOperator`.
    """

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(plan, tensors)
        options = plan.chain.options
        self.head_dim, self.group = options["head_dim"], options["group"]
        self.causal, self.dropout, self.dropout_after = (
            options[name] for name in ("causal", "dropout", "dropout_after")
        )

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = one_input(x, named)
        return self.run(x, kernel=self.pick(math.prod(x.shape[:-1])))

    def run(self, x: Tensor, kernel: str) -> Tensor:
        """``[N, T, D]`` through one kernel."""
        engine, count = self.engine(kernel), x.shape[0]
        projected = self._projected(engine, engine.take(x.reshape(-1, x.shape[-1])))
        attend = partial(F.scaled_dot_product_attention, is_causal=self.causal, dropout_p=self._dropout_now)
        if kernel == "lanes":
            found = self._in_lanes(engine, projected, count, attend)
        else:
            found = self._written(engine, attend(*self._heads(map(engine.join, projected), count)))
        return F.dropout(found, self.dropout_after, self.training).view(*x.shape[:-1], -1)

    def _in_lanes(self, engine: Any, projected: Sequence[Any], count: int, attend: Callable[..., Tensor]) -> Tensor:
        """Blocks that attend apart as well: from ``[N·T, …]`` queries, keys and values of each to ``[N·T, D']`` of all."""

        def block(*parts: Tensor) -> Tensor:
            return _flat(attend(*self._heads(parts, count)))

        return engine.write(engine.each(block, *projected), *self._output_names(), 2)

    @property
    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    @property
    def draws(self) -> bool:
        return bool(self.dropout)

    def _projected(self, engine: Any, read: Any) -> list[Any]:
        """Queries, keys and values of ``[tokens, D]``, in blocks."""
        roles = self.chain.options["roles"]
        if self.chain.options["packed"] is None:
            return [engine.linear(read, f"{roles[role]}.weight", f"{roles[role]}.bias") for role in "qkv"]
        weight, bias = self._packed_names()
        both = engine.linear(read, weight, bias)
        packed, size = self.chain.options["packed"], self.head_dim
        return [engine.each(lambda x, p=p: _third(x, packed, size, p), both) for p in range(3)]

    def _packed_names(self) -> tuple[str, str]:
        packed = self.chain.options["roles"]["q"]
        return f"{packed}.weight", f"{packed}.bias"

    def _heads(self, projected: Iterable[Tensor], count: int) -> list[Tensor]:
        """Queries, keys and values ``[N·T, …]`` of some heads to ``[N, heads, T, E]``, keys and values once for each of their query heads."""
        query, *others = (
            part.view(count, part.shape[0] // max(count, 1), -1, self.head_dim).transpose(1, 2) for part in projected
        )
        return [query, *(part.repeat_interleave(self.group, 1) if self.group > 1 else part for part in others)]

    def _written(self, engine: Any, mixed: Tensor) -> Tensor:
        """``[N, heads, T, E]`` to ``[N·T, D']``."""
        wide = self.group * self.head_dim
        blocks = engine.split(_flat(mixed), [size * wide for size in self.layers[1].sizes])
        return engine.write(blocks, *self._output_names(), 2)

    def _output_names(self) -> tuple[str, str]:
        return self.chain.weights[-1], self.chain.options["roles"]["o"] + ".bias"


def _flat(mixed: Tensor) -> Tensor:
    """``[N, heads, T, E]`` to ``[N·T, heads·E]``."""
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


class RoutedMultiheadAttention(RoutedAttention):
    """`torch.nn.MultiheadAttention` as blocks of heads, with its arguments and results."""

    in_proj_bias = None
    """Tells the layers of `torch.nn.TransformerEncoder` that they can't take the projections' weights and go a faster way."""
    _qkv_same_embed_dim = True

    def __init__(self, plan: ChainPlan, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(plan, tensors)
        self.embed_dim, self.num_heads = plan.chain.widths[0], plan.chain.widths[1]
        self.batch_first = plan.chain.options["batch_first"]

    def _packed_names(self) -> tuple[str, str]:
        weight = self.chain.weights[0]
        return weight, weight.removesuffix("weight") + "bias"

    def forward(self, query: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As `run`, through the kernel that is fastest for so many tokens."""
        return self.run(query, *others, kernel=self.pick(math.prod(query.shape[:-1])), **options)

    def run(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        kernel: str,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`, through one kernel.

        Raises:
            UnsupportedError: ``is_causal`` without the mask, or a nested tensor.
        """
        if is_causal and attn_mask is None:
            raise UnsupportedError("is_causal=True is a hint about attn_mask; give attn_mask as well.")
        if query.is_nested:
            raise UnsupportedError("routed attention takes no nested tensors; give padded ones with key_padding_mask.")
        batched = query.dim() == 3
        given = [x if batched else x.unsqueeze(1) for x in (query, key, value)]
        swapped = batched and self.batch_first
        apart = kernel == "lanes" and not need_weights and (attn_mask is None or attn_mask.dim() == 2)
        engine = self.engine("loop" if kernel == "lanes" and not apart else kernel)
        count, steps = (given[0].shape[n] for n in ((0, 1) if swapped else (1, 0)))
        tokens = [(x if swapped else x.transpose(0, 1)).reshape(-1, self.embed_dim) for x in given]
        names = self._packed_names()
        projected = [engine.linear(engine.take(x), *names, part=(part, 3)) for part, x in enumerate(tokens)]
        dropout, weights = self._dropout_now, None
        if apart:

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                mask = self._mask(attn_mask, key_padding_mask, query, key)
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)

            found = self._in_lanes(engine, projected, count, attend)
        else:
            heads = self._heads(map(engine.join, projected), count)
            mask = self._mask(attn_mask, key_padding_mask, heads[0], heads[1])
            if need_weights:
                mixed, weights = self._weighed(heads, mask, dropout)
                weights = weights.mean(1) if average_attn_weights else weights
                weights = weights if batched else weights.squeeze(0)
            else:
                mixed = F.scaled_dot_product_attention(*heads, attn_mask=self._of_kept(mask), dropout_p=dropout)
            found = self._written(engine, mixed)
        found = found.view(count, steps, -1)
        found = found if swapped else found.transpose(0, 1)
        return found if batched else found.squeeze(1), weights

    def _mask(self, mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """What is added to the scores of all heads, ``[N or 1, heads or 1, T or 1, S]``; in torch's masks True means left out."""
        total = None
        if mask is not None:
            full = _additive(mask, query)
            total = full.view(-1, self.num_heads, *full.shape[1:]) if full.dim() == 3 else full[None, None]
        if padding is not None:
            columns = _additive(padding, query).view(-1, 1, 1, key.shape[2])
            total = columns if total is None else total + columns
        return total

    def _of_kept(self, mask: Tensor | None) -> Tensor | None:
        """The part of a mask that the heads that are left see, in their order."""
        return mask if mask is None or mask.shape[1] == 1 else mask.index_select(1, self.layers[1].index)

    def _weighed(self, heads: list[Tensor], mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
        """What heads give, and the attention of all, ``[N, heads, T, S]``.

        Isolated heads have one query and one key for everything, so that they attend evenly to what their mask allows.
        """
        query, key, value = heads
        kept, scores = self._of_kept(mask), query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
        weights = torch.softmax(scores if kept is None else scores + kept, -1)
        shape = (weights.shape[0], self.num_heads, *weights.shape[2:])
        even = weights.new_zeros(shape) if mask is None else mask.expand(shape)
        every = torch.softmax(even, -1).index_copy(1, self.layers[1].index, weights)
        every = F.dropout(every, dropout, dropout > 0)
        return every.index_select(1, self.layers[1].index) @ value, every


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Attention of projected ``[N, T, heads·E]`` and ``[N, S, kv_heads·E]``, one head after another, ``[N, T, heads·E]``."""
    size, outputs = q.shape[-1] // heads, []
    for head in range(heads):
        own = head // (heads // kv_heads)
        query, at = q[..., head * size : (head + 1) * size], slice(own * size, (own + 1) * size)
        scores = torch.einsum("nte,nse->nts", query, k[..., at]) * size**-0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if mask is not None:
            scores = scores + mask
        outputs.append(torch.einsum("nts,nse->nte", torch.softmax(scores, -1), v[..., at]))
    return torch.cat(outputs, -1)


def _third(packed: Tensor, how: str, head_dim: int, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of a packed projection ``[…, 3·heads·E]``."""
    size = packed.shape[-1] // 3
    if how == "parts":
        return packed[..., part * size : (part + 1) * size]
    return packed.unflatten(-1, (size // head_dim, 3, head_dim))[..., part, :].flatten(-2)


# ---- attention written by hand


@dataclass(frozen=True)
class AttentionForm:
    """A recognised attention: which module is which projection (own names; one for all three where packed), and its settings.

    `longest` is a sequence that it can take; its mask may be too small for longer ones.
    """

    roles: dict[str, str]
    heads: int
    kv_heads: int
    causal: bool
    packed: str | None
    dropout: float
    dropout_after: float
    longest: int = LONGEST


class _Trial(fx.Interpreter):
    """Runs a trace with other weights, without dropout, and without calling any module of the model."""

    def __init__(self, module: nn.Module, graph: fx.Graph, linears: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__(fx.GraphModule(module, graph, "trial"), garbage_collect_values=False)
        self.linears = linears

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return F.linear(args[0], *self.linears[target]) if target in self.linears else args[0]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is F.dropout:
            return args[0]
        if target is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return found.float() if isinstance(found, Tensor) and found.is_floating_point() else found


def attention_form(module: nn.Module) -> AttentionForm | str | None:
    """What attention a module computes on its one input; why it isn't known although it attends; None for anything else."""
    if sum(computes(child, nn.Linear) for child in module.children()) < 2:
        return None
    graph = own_graph(module, training=True)
    if graph is None:
        return "its forward can't be traced" if _mentions_attention(module) else None
    attends = any(
        node.target in (F.scaled_dot_product_attention, F.softmax, torch.softmax, "softmax") for node in graph.nodes
    )
    if not attends:
        return None
    known = _identity(module, graph)
    if known not in _RECOGNISED:
        _RECOGNISED[known] = _recognised(module, graph)
    return _RECOGNISED[known] or "its forward isn't plain multi-head attention of one input"


_RECOGNISED: dict[tuple[Any, ...], AttentionForm | None] = {}


def _identity(module: nn.Module, graph: fx.Graph) -> tuple[Any, ...]:
    """What the outcome of a trial depends on: the trace, its modules, and the content of tensors that it reads."""
    read = [node.target for node in graph.nodes if node.op == "get_attr"]
    tensors = [fx.graph_module._get_attr(module, name) for name in read]
    contents = tuple(
        (tuple(t.shape), None if t.is_meta else hash(t.detach().double().cpu().numpy().tobytes()))
        for t in tensors
        if isinstance(t, Tensor)
    )
    return graph.python_code("self").src, repr(module), contents


def _mentions_attention(module: nn.Module) -> bool:
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    return "scaled_dot_product_attention" in names or "softmax" in names


def _recognised(module: nn.Module, graph: fx.Graph) -> AttentionForm | None:
    structure = _projections(module, graph)
    if structure is None:
        return None
    source, out, after, inner = structure
    children = {name: module.get_submodule(name) for name in [*source, out]}
    dropout = _attention_dropout(module, graph, out)
    if dropout is None:
        return None
    generator = torch.Generator().manual_seed(0)
    device = children[out].weight.device
    weights = {
        name: (
            (torch.randn(child.weight.shape, generator=generator) / math.sqrt(child.in_features)).to(device),
            None if child.bias is None else torch.randn(child.out_features, generator=generator).to(device),
        )
        for name, child in children.items()
    }
    width = children[source[0]].in_features
    tried = [torch.randn(n, t, width, generator=generator).to(device) for n, t in ((2, 5), (1, 3))]
    try:
        with torch.no_grad():
            found = [_Trial(module, graph, weights).run(x) for x in tried]
    except Exception:
        return None
    if not all(
        isinstance(y, Tensor) and y.shape[:2] == x.shape[:2] and y.dim() == 3 for x, y in zip(tried, found, strict=True)
    ):
        return None
    with torch.no_grad():
        for form in _candidates(graph, source, out, inner, children, dropout, after):
            if all(_agrees(form, weights, x, y) for x, y in zip(tried, found, strict=True)):
                return replace(form, longest=_longest(module, graph, weights, tried[0]))
    return None


def _longest(module: nn.Module, graph: fx.Graph, weights: Mapping[str, tuple[Tensor, Tensor | None]], x: Tensor) -> int:
    """A sequence as long as `LONGEST`, or as the module can take to a factor of two."""
    length = LONGEST
    while length > x.shape[1]:
        try:
            _Trial(module, graph, weights).run(x[:1].mean(1, keepdim=True).expand(1, length, -1))
        except Exception:
            length //= 2
        else:
            return length
    return int(x.shape[1])


def _projections(module: nn.Module, graph: fx.Graph) -> tuple[list[str], str, float, int] | None:
    """Linear modules that read the input, the one that makes the output, the dropout after it, and its input's width."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        return None
    readers, others = [], []
    for node in graph.nodes:
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            if computes(child, nn.Linear):
                (readers if node.args == (inputs[0],) else others).append(node)
            elif not isinstance(child, (nn.Dropout, nn.Identity)):
                return None
    last, after = output.args[0], 0.0
    if last.op == "call_module" and isinstance(module.get_submodule(str(last.target)), nn.Dropout):
        after = module.get_submodule(str(last.target)).p
        last = last.args[0]
    names = [str(node.target) for node in readers]
    if others != [last] or len(readers) not in (1, 3) or len(set(names)) != len(names):
        return None
    return names, str(last.target), after, module.get_submodule(str(last.target)).in_features


def _attention_dropout(module: nn.Module, graph: fx.Graph, out: str) -> float | None:
    """Dropout of attention; None where there is one in a place that isn't known."""
    found = 0.0
    ends = [node for node in graph.nodes if node.op == "call_module" and node.target == out]
    for node in graph.nodes:
        if node.target is F.dropout:
            return None
        if node.target is F.scaled_dot_product_attention:
            given = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
            if not isinstance(given, (int, float)):
                return None
            found = float(given)
        elif node.op == "call_module" and type(module.get_submodule(str(node.target))) is nn.Dropout:
            if node.args[0] in ends:
                continue
            source = node.args[0]
            if source.target not in (F.softmax, torch.softmax, "softmax"):
                return None
            found = module.get_submodule(str(node.target)).p
    return found


def _candidates(
    graph: fx.Graph,
    source: list[str],
    out: str,
    inner: int,
    children: Mapping[str, nn.Module],
    dropout: float,
    after: float,
) -> Iterator[AttentionForm]:
    """Every form that the projections' widths and the numbers in the trace allow."""
    numbers: set[int] = set()
    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda a: numbers.add(a) if type(a) is int else None)
    divisors = {n for n in numbers if n > 0 and inner % n == 0}
    heads = sorted(divisors | {inner // n for n in divisors}, reverse=True)
    if len(source) == 1:
        if children[source[0]].out_features != 3 * inner:
            return
        for count, causal, packed in product(heads, (False, True), ("parts", "heads")):
            roles = {"q": source[0], "k": source[0], "v": source[0], "o": out}
            yield AttentionForm(roles, count, count, causal, packed, dropout, after)
        return
    for order, count, causal in product(permutations(source), heads, (False, True)):
        q, k, v = (children[name].out_features for name in order)
        size = inner // count
        if q != inner or k != v or k % size or count % (k // size):
            continue
        roles = {**dict(zip("qkv", order, strict=True)), "o": out}
        yield AttentionForm(roles, count, k // size, causal, None, dropout, after)


def _agrees(form: AttentionForm, weights: Mapping[str, tuple[Tensor, Tensor | None]], x: Tensor, found: Tensor) -> bool:
    head_dim = weights[form.roles["o"]][0].shape[1] // form.heads
    if form.packed is None:
        q, k, v = (F.linear(x, *weights[form.roles[role]]) for role in "qkv")
    else:
        q, k, v = (_third(F.linear(x, *weights[form.roles["q"]]), form.packed, head_dim, part) for part in range(3))
    query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in (q, k, v))
    key, value = (part.repeat_interleave(form.heads // form.kv_heads, 1) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=form.causal)
    expected = F.linear(mixed.transpose(1, 2).flatten(2), *weights[form.roles["o"]])
    return expected.shape == found.shape and bool((expected - found).abs().max() <= 1e-4 * expected.abs().max())


# ---- the kind


@register_kind
class AttentionKind(OperatorKind):
    """Multi-head self-attention, with as many key heads as query heads or fewer."""

    name = "attention"
    holds = "attention"

    def find(self, name: str, module: nn.Module) -> OperatorChain | str | None:
        if isinstance(module, nn.MultiheadAttention):
            return _torch_attention(name, module)
        form = attention_form(module)
        return form if form is None or isinstance(form, str) else _written_by_hand(name, module, form)

    def build(self, plan: ChainPlan, tensors: Tensors, module: nn.Module | None = None) -> RoutedAttention:
        kind = RoutedMultiheadAttention if plan.chain.options["torch"] else RoutedAttention
        return kind(plan, tensors)

    def reference(self, chain: OperatorChain, tensors: Tensors, *inputs: Any) -> Any:
        options, x = chain.options, inputs[0]
        heads, kv_heads = chain.widths[1] * options["group"], chain.widths[1]
        swapped = options["torch"] and not options["batch_first"]
        x = x.transpose(0, 1) if swapped else x
        if options["packed"] is None:
            q, k, v = (
                F.linear(x, tensors[f"{options['roles'][r]}.weight"], tensors.get(f"{options['roles'][r]}.bias"))
                for r in "qkv"
            )
        else:
            weight = chain.weights[0]
            packed = F.linear(x, tensors[weight], tensors.get(weight.removesuffix("weight") + "bias"))
            q, k, v = (_third(packed, options["packed"], options["head_dim"], part) for part in range(3))
        mixed = plain_attention(q, k, v, heads, kv_heads, options["causal"])
        found = F.linear(mixed, tensors[chain.weights[-1]], tensors.get(f"{options['roles']['o']}.bias"))
        found = found.transpose(0, 1) if swapped else found
        return (found, None) if options["torch"] else found

    def inputs(self, chain: OperatorChain, shape: tuple[int, ...], draw: Draw, like: Tensor) -> tuple[Any, ...]:
        """Tokens of sequences as long as the module takes."""
        tokens = 1
        for size in shape:
            tokens *= size
        steps = min(chain.options["longest"], tokens)
        swapped = chain.options["torch"] and not chain.options["batch_first"]
        order = (steps, max(1, tokens // steps)) if swapped else (max(1, tokens // steps), steps)
        x = draw(*order, chain.widths[0]).to(like)
        return (x, x, x, None, False) if chain.options["torch"] else (x,)


def _torch_attention(name: str, module: nn.MultiheadAttention) -> OperatorChain | str:
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"a {type(module).__name__} with a forward of its own"
    if not module._qkv_same_embed_dim:
        return "its keys or values have another width than its queries"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn add keys that belong to no block"
    if "in_proj_weight" not in module._parameters or "weight" not in module.out_proj._parameters:
        return "its weights are computed from others"
    prefix = f"{name}." if name else ""
    roles = {**dict.fromkeys("qkv", prefix + "in_proj"), "o": prefix + "out_proj"}
    biased = module.in_proj_bias is not None
    size, heads, head_dim = module.embed_dim, module.num_heads, module.head_dim
    parameters = [_projection(f"{prefix}in_proj_weight", size, heads, head_dim, "parts")]
    if biased:
        parameters.append(_projection(f"{prefix}in_proj_bias", None, heads, head_dim, "parts"))
    parameters += _output(prefix + "out_proj", size, heads, head_dim, module.out_proj.bias is not None)
    options = {
        "torch": True, "roles": roles, "packed": "parts", "head_dim": head_dim, "group": 1, "causal": False,
        "dropout": module.dropout, "dropout_after": 0.0, "longest": LONGEST, "batch_first": module.batch_first,
    }  # fmt: skip
    operators = (name, f"{prefix}out_proj")
    return OperatorChain(name, operators, (), (size, heads, size), "attention", tuple(parameters), options)


def _written_by_hand(name: str, module: nn.Module, form: AttentionForm) -> OperatorChain:
    prefix = f"{name}." if name else ""
    children = {role: module.get_submodule(own) for role, own in form.roles.items()}
    width, out = children["q"].in_features, children["o"]
    head_dim, group = out.in_features // form.heads, form.heads // form.kv_heads
    parameters = []
    for role in "qkv" if form.packed is None else "q":
        own, linear = f"{prefix}{form.roles[role]}", children[role]
        size = head_dim * (group if role == "q" and form.packed is None else 1)
        parameters.append(_projection(f"{own}.weight", width, form.kv_heads, size, form.packed))
        if linear.bias is not None:
            parameters.append(_projection(f"{own}.bias", None, form.kv_heads, size, form.packed))
    parameters += _output(
        prefix + form.roles["o"], out.out_features, form.kv_heads, group * head_dim, out.bias is not None
    )
    options = {
        "torch": False, "roles": {role: prefix + own for role, own in form.roles.items()}, "packed": form.packed,
        "head_dim": head_dim, "group": group, "causal": form.causal, "dropout": form.dropout,
        "dropout_after": form.dropout_after, "longest": form.longest,
    }  # fmt: skip
    operators = tuple(dict.fromkeys(options["roles"].values()))
    widths = (width, form.kv_heads, out.out_features)
    return OperatorChain(name, operators, (), widths, "attention", tuple(parameters), options)


def _projection(name: str, width: int | None, heads: int, size: int, packed: str | None) -> LayerParameter:
    """A projection's weight ``[…, width]`` or bias, with heads as out units."""
    rows, roles = {None: ((heads, size), "oc"), "parts": ((3, heads, size), "coc"), "heads": ((heads, 3, size), "occ")}[
        packed
    ]
    total = math.prod(rows)
    if width is None:
        return LayerParameter(name, DependencyLayout((total,), rows, roles), 1, None, (len(rows),))
    layout = DependencyLayout((total, width), (*rows, width), roles + "i")
    return LayerParameter(name, layout, 1, 0, (len(rows), 1))


def _output(own: str, width: int, heads: int, size: int, biased: bool) -> list[LayerParameter]:
    """The output projection, with heads as in units."""
    layout = DependencyLayout((width, heads * size), (width, heads, size), "oic")
    weight = LayerParameter(f"{own}.weight", layout, 2, 1, (1, 2))
    return [weight, LayerParameter(f"{own}.bias", plain_layout((width,)), 2)] if biased else [weight]
