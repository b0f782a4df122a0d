"""Packed sequences: each has the bits that it has alone, forward and backward, whatever is packed beside it."""

import pytest
import torch
from cases import SMALL, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sttm_kernels as sttm
from sttm_kernels import dispatch, functional, ops, sequences
from sttm_kernels.nn import GENERATORS, STTM
from sttm_kernels.testing import DTYPES, assert_equal, make_tokens
from sttm_kernels.validate import NORMALIZATIONS, REDUCTIONS, SIMILARITIES, WEIGHTS


class Call:
    """A verb and what follows it, on packed sequences or, if `lengths` is None, on one alone."""

    def __init__(self, verb, impl, lengths=None, **how):
        self.verb, self.how, self.reduce = verb, how, how.pop("reduce", "mean")
        self.packed = lengths is not None
        self.options = {"impl": impl, "lengths": lengths} if self.packed else {"impl": impl}
        self.groups = self.tokens = None  # of each sequence

    def __call__(self, x, q, meta=None, size=None, positions=None):
        if not self.packed:
            x, q, size = (None if value is None else value[None] for value in (x, q, size))
        out, plan = getattr(self, self.verb)(x, q, meta, size=size, positions=positions)
        found = {f"group {name}": getattr(out, name) for name in ("x", "size", "positions")}
        if not self.packed:
            found = {name: None if value is None else value[0] for name, value in found.items()}
        if plan is not None:
            self.groups = plan.merged_lengths if self.packed else (plan.num_groups,)
            found |= {name: getattr(plan, name)[0] for name in ("index", "order") if getattr(plan, name) is not None}
            names = [name for name in ("score", "lse", "weight") if getattr(plan, name) is not None]
            found |= {f"token {name}": getattr(plan, name)[0] for name in names}
            full = sttm.unmerge(out.x, plan, impl=self.options["impl"])
            found["token back"] = full if self.packed else full[0]
            if self.packed:
                assert out.lengths == plan.merged_lengths
                assert sum(out.lengths) == len(out.x)
                again = sttm.match(out.x.detach(), 1, lengths=out.lengths, impl=self.options["impl"])
                both = sttm.compose(plan, again, impl=self.options["impl"])
                assert (both.lengths, both.merged_lengths) == (plan.lengths, again.merged_lengths)
                assert torch.equal(both.index, again.index.gather(1, plan.index.long()))
        elif self.packed:
            self.groups = out.lengths
        return {name: value for name, value in found.items() if value is not None}

    def match(self, x, q, _, **rows):
        plan = sttm.match(q, **self.how, **self.options)
        return sttm.merge(x, plan, **rows, reduce=self.reduce, impl=self.options["impl"]), plan

    def assign(self, x, q, meta, **rows):
        plan = sttm.assign(q, meta, **self.how, **self.options)
        return sttm.merge(x, plan, **rows, reduce=self.reduce, impl=self.options["impl"]), plan

    def assign_merge(self, x, q, meta, **rows):
        return functional.assign_merge(x, q, meta, **self.how, **self.options, **rows)

    def clips(self, x, q, _, **rows):
        how = {name: value for name, value in self.how.items() if name != "grid"}
        torch.manual_seed(0)  # for equal parameters
        module = STTM(x.shape[-1], impl=self.options["impl"], metric_dim=q.shape[-1], **how)
        torch.nn.init.normal_(module.motion.weight)
        return module.to(x.device)(x, self.how["grid"], metric=q, return_plan=True, **rows)

    def soft_merge(self, x, q, meta, **rows):
        return sttm.soft_merge(x, q, meta, **self.how, **self.options, **rows), None


def inputs_of(T, S, K, D, heads, dtype, rows, seed):
    """Of T tokens and S sequences; without meta tokens if K is 0."""
    q = make_tokens(1, T, D * max(heads, 1), dtype, seed=seed)[0]
    given = {"x": make_tokens(1, T, 5, dtype, seed=seed + 1)[0]}
    given["q"] = q if not heads else q.view(T, heads, D).transpose(0, 1)
    if K:
        given["meta"] = make_tokens(S, K, D, dtype, seed=seed + 2)
    if rows:
        draw = torch.Generator().manual_seed(seed + 3)
        given["size"] = torch.randint(0, 4, (T,), generator=draw).float()
        given["positions"] = torch.rand((T, 3), generator=draw)
    return given


def as_each_alone(backend, verb, lengths, given, each=lambda s: {}, **how):
    """Outputs and gradients of a packed call are those of every sequence alone, with the options `each(s)` of its own.

    So are those of `how`, of which r may be a list.
    """
    given = {name: value.to(backend.device) for name, value in given.items()}
    packed = Call(verb, backend.impl, lengths, **how)
    found = run(packed, given)
    groups = iter(torch.tensor([0, *packed.groups]).cumsum(0).tolist())
    first, start = next(groups), 0
    for s, n in enumerate(lengths):
        last = next(groups)
        rows, mine = slice(start, start + n), slice(first, last)
        if n == 0:
            assert not any(bool(found[f"group {name}"][mine].any()) for name in ("x", "size"))
            first = last
            continue
        own = {"x": given["x"][rows], "q": given["q"][..., rows, :]}
        own |= {name: given[name][rows] for name in ("size", "positions") if name in given}
        counts = how.get("meta_lengths")
        sets = slice(s, s + 1) if counts is None else slice(sum(counts[:s]), sum(counts[: s + 1]))
        own |= {"meta": given["meta"][sets]} if "meta" in given else {}
        alone = Call(verb, backend.impl, **{**how, **each(s), **({} if counts is None else {"meta_lengths": None})})
        expected = run(alone, own)
        if how.get("threshold") is not None:  # which leaves empty groups of one alone
            expected = {k: v[: last - first] if k.startswith("group") else v for k, v in expected.items()}
        for name, value in expected.items():
            if name == "order" and verb == "assign_merge" and name not in found:  # of all sequences together
                continue
            here = found[name]
            if name == "gradient of meta":
                here = here[sets]
            elif name == "gradient of q":
                here = here[..., rows, :]
            elif name in ("index", "order"):
                here = here[rows] - (first if name == "index" else start)
            else:
                here = here[mine] if name.startswith("group") else here[rows]
            assert_equal(f"{name} of sequence {s}", here, value)
        first, start = last, start + n
    assert first == (0 if not packed.groups else sum(packed.groups))


@st.composite
def arrangements(draw, lengths, num_prefix, grids):
    """Partition, grid, window and protected tokens of packed sequences, and those of each."""
    T, each = sum(lengths), [{} for _ in lengths]
    start = torch.tensor([0, *lengths]).cumsum(0).tolist()
    how = {"protect": draw(st.none() | st.lists(st.integers(0, T - 1), max_size=5, unique=True))}
    parts = ("alternate", "tensor") if grids is None else ("alternate", "tensor", "frames", "random2d")
    how["partition"] = draw(st.sampled_from(parts))
    if grids is not None:
        how["grid"] = grids
        if how["partition"] != "random2d":
            how["window"] = draw(st.none() | st.tuples(*[st.integers(1, 3)] * 3))
    if how["partition"] == "tensor":
        how["partition"] = torch.tensor(draw(st.lists(st.booleans(), min_size=T, max_size=T)))
    seed = draw(st.integers(0, 99))
    how["generator"] = torch.Generator().manual_seed(seed)
    again = torch.Generator().manual_seed(seed)
    for s, mine in enumerate(each):
        rows = range(start[s], start[s + 1])
        mine["generator"] = again
        if grids is not None:
            mine["grid"] = grids[s]
        if how["protect"] is not None:
            mine["protect"] = [n - rows.start for n in how["protect"] if n in rows]
        if isinstance(how["partition"], torch.Tensor):
            mine["partition"] = how["partition"][rows.start : rows.stop]
    return how, each


@st.composite
def batches(draw, verb):
    """(lengths, inputs, options, options of each sequence) of one verb."""
    longest, most = (12, 3) if SMALL else (70, 6)
    grids = draw(st.none() | st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=most))
    if verb == "clips" and grids is None:
        grids = draw(st.lists(st.sampled_from([(2, 2, 3), (1, 3, 3), (3, 2, 3), (1, 1, 1)]), min_size=1, max_size=most))
    if grids is not None and verb in ("match", "clips"):
        num_prefix = draw(st.integers(0, 2))
        lengths = [num_prefix + t * h * w for t, h, w in grids]
    else:
        lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=most).filter(any))
        num_prefix, grids = draw(st.integers(0, min(2, min(lengths)))), None
    how, each = {}, None
    if verb == "clips":
        keep = st.floats(0.01, 1)
        how = {"num_prefix": num_prefix, "grid": grids, "second_moment": draw(st.booleans())}
        how["meta"] = draw(st.sampled_from(sorted(GENERATORS)))
        how["spatial_keep"] = draw(st.one_of(st.none(), keep, st.integers(1, min(h * w for _, h, w in grids))))
        how["temporal_keep"] = draw(st.one_of(st.none(), keep, st.just(1)))
        how["temporal_window"] = draw(st.sampled_from([None, 1]))
        each = [{"grid": grid} for grid in grids]
    elif verb == "match":
        how["num_prefix"] = num_prefix
        how["r"] = draw(st.one_of(st.integers(0, 40), st.floats(0, 1), st.tuples(*[st.integers(0, 40)] * len(lengths))))
        how["threshold"] = draw(st.sampled_from([None, None, -0.2, 0.1]))
        how["reduce"] = draw(st.sampled_from(REDUCTIONS))
        r, shares = how["r"], isinstance(how["r"], float)
        each = [
            {"r": int(r * (n - num_prefix)) if shares else r[s] if isinstance(r, tuple) else r}
            for s, n in enumerate(lengths)
        ]
        geometry = draw(arrangements(lengths, num_prefix, grids))
        how |= geometry[0]
        each = [own | more for own, more in zip(each, geometry[1], strict=True)]
    if verb != "match":
        how["similarity"] = draw(st.sampled_from(SIMILARITIES))
        how["temperature"] = draw(st.sampled_from([1.0, 0.3]))
        if verb == "soft_merge":
            how["normalize"] = draw(st.sampled_from(NORMALIZATIONS))
        else:
            how["weight"] = draw(st.sampled_from(WEIGHTS))
    K = 0 if verb in ("match", "clips") else draw(st.integers(1, 9))
    counts = (
        None
        if not K or draw(st.booleans())
        else draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    )
    D, heads, rows = draw(st.integers(1, 20)), draw(st.sampled_from([0, 0, 2])), draw(st.booleans())
    given = inputs_of(
        sum(lengths), len(lengths), K, D, heads, draw(st.sampled_from(DTYPES[:3])), rows, draw(st.integers(0, 99))
    )
    if counts is not None:
        how["meta_lengths"] = counts
        given["meta"] = make_tokens(1, sum(counts), D, given["q"].dtype, seed=7)[0]
    return lengths, given, how, (lambda s: {}) if each is None else each.__getitem__


@pytest.mark.parametrize("verb", ["match", "assign", "assign_merge", "soft_merge", "clips"])
def test_every_sequence_has_the_bits_that_it_has_alone(backend, verb, request):
    count = request.config.getoption("batches")
    if count is None and SMALL and verb != "match":
        pytest.skip("takes long in the interpreter: with --batches alone")
    count = count or (1 if SMALL else 10)
    checked = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(batches(verb))
    def check(batch):
        lengths, given, how, each = batch
        as_each_alone(backend, verb, lengths, given, each, **how)
        checked.append(len(lengths))

    check()
    print(f"{verb}, {backend.impl}: {len(checked)} batches, {sum(checked)} sequences")


def test_sequences_of_many_tiles_and_of_none(backend):
    """Longest in the middle, so that it is not where it stands in the table of them."""
    lengths = [2, 0, 130] if SMALL else [12, 0, 1, 700, 260, 9, 0]
    given = inputs_of(sum(lengths), len(lengths), 0, 8, 0 if SMALL else 2, torch.float16, False, 0)
    as_each_alone(backend, "match", lengths, given, lambda s: {"r": lengths[s] // 2}, r=0.5)


@pytest.mark.parametrize("K", [3] if SMALL else [3, 70])
@pytest.mark.parametrize("normalize", [None, *NORMALIZATIONS])
def test_sequences_of_several_spans_and_of_none(backend, normalize, K):
    """Long enough that sums over their tokens are split; by assign if there is no `normalize`.

    Groups of some are long on average, those of others not.
    """
    lengths = [3, 40, 0, 1, 150] if SMALL else [3, 300, 0, 1, 140]
    verb, how = ("assign", {}) if normalize is None else ("soft_merge", {"normalize": normalize})
    given = inputs_of(sum(lengths), len(lengths), K, 16, 2 if SMALL else 0, torch.float32, True, 0)
    as_each_alone(backend, verb, lengths, given, temperature=0.3, **how)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_a_lone_token_has_no_gradient_through_its_softmax(backend, similarity):
    """Whatever is rounded on the way: also where three times x over three is not x."""
    lengths = [1, 1, 7] if SMALL else [1, 1, 1, 40, 1, 1, 1]
    given = inputs_of(sum(lengths), len(lengths), 3, 5, 0, torch.float32, True, 0)
    given["size"] = torch.full_like(given["size"], 3)
    as_each_alone(backend, "soft_merge", lengths, given, normalize="tokens", similarity=similarity)


@pytest.mark.shipped_blocks
def test_short_and_long_sequences_of_assign_merge(backend):
    """Short ones take one launch alone, of blocks of two sizes in Triton."""
    lengths, K = [3, 64, 0, 70, 300], 3
    given = inputs_of(sum(lengths), len(lengths), K, 16, 0, torch.float16, True, 0)
    as_each_alone(backend, "assign_merge", lengths, given, temperature=0.3)
    given = {name: value.to(backend.device) for name, value in given.items() if name in ("x", "q", "meta")}
    given["meta"][:, 2] = given["meta"][:, 1]  # a tie, which leaves the last group empty
    fill = make_tokens(len(lengths), K, 5, torch.float16, backend.device, seed=4)
    merged, _ = functional.assign_merge(**given, fill=fill, lengths=lengths, impl=backend.impl)
    for s, (own, x, q) in enumerate(zip(merged.x.split(K), *(given[n].split(lengths) for n in "xq"), strict=True)):
        alone = fill[s : s + 1]
        if len(x):
            at = slice(s, s + 1)
            out, _ = functional.assign_merge(x[None], q[None], given["meta"][at], fill=fill[at], impl=backend.impl)
            alone = out.x
        assert_equal(f"x of sequence {s}", own, alone[0])


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_a_batch_with_padding_merges_to_packed_tokens(backend, threshold):
    lengths = [6, 3, 9]
    tokens = inputs_of(18, 3, 0, 8, 0, torch.float32, True, 0)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    rows = {name: value.to(backend.device) for name, value in tokens.items()}
    wide = {
        name: value.new_full((3, 9, *value.shape[1:]), torch.nan).masked_scatter(
            mask.view(3, 9, *[1] * (value.dim() - 1)).to(value.device), value
        )
        for name, value in rows.items()
    }
    how = {"r": 3, "num_prefix": 1, "threshold": threshold, "impl": backend.impl}
    wide["x"].requires_grad_()
    plan = sttm.pack(sttm.match(wide["q"], mask=mask.to(backend.device), **how))
    given = {name: wide[name].flatten(0, 1) for name in ("x", "size", "positions")}
    out = sttm.merge(**given, plan=plan, impl=backend.impl)
    own = sttm.match(rows["q"], lengths=lengths, **how)
    expected = sttm.merge(rows["x"], own, rows["size"], rows["positions"], impl=backend.impl)
    assert (plan.lengths, out.lengths) == ((9, 9, 9), own.merged_lengths)
    assert torch.equal(plan.index.cpu()[0] >= 0, mask.flatten())
    assert torch.equal(plan.index[0][mask.flatten().to(backend.device)], own.index[0])
    for name in ("x", "size", "positions"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name))
    back = sttm.unmerge(out.x, plan, impl=backend.impl)
    assert not bool(back[~mask.flatten()].any())
    (gradient,) = torch.autograd.grad(out.x.square().sum(), wide["x"])
    assert not bool(gradient[~mask].any())
    assert torch.equal((gradient[mask] != 0).any(1), rows["size"] > 0)


def test_groups_without_tokens_are_left_out(backend):
    q, meta = make_tokens(1, 7, 8)[0].to(backend.device), make_tokens(2, 6, 8).to(backend.device)
    plan = sttm.assign(q, meta, lengths=[3, 4], impl=backend.impl)
    packed = sttm.pack(plan)
    assert packed.merged_lengths == tuple(len(part.unique()) for part in plan.index[0].split([3, 4]))
    for name in ("x", "size"):
        every, some = (getattr(sttm.merge(q, each, impl=backend.impl), name) for each in (plan, packed))
        there = plan.index[0].unique().long()
        assert_equal(name, some, every[there])


GRIDS = [(2, 3, 4), (3, 2, 2), (1, 4, 2)]


@pytest.mark.parametrize(
    "options",
    [{"partition": "frames"}]
    if SMALL
    else [
        {"partition": "frames"},
        {"window": (2, 2, 2)},
        {"partition": "frames", "window": (2, 2, 2), "protect": True},
        {"partition": "random2d"},
        {"protect": True},
        {"partition": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_grids_partitions_and_protected_tokens_are_of_each_sequence(backend, options):
    lengths = [1 + t * h * w for t, h, w in GRIDS]
    start, T = [0, 25, 38], sum(lengths)
    protect = [2, 3, 27, 40] if options.get("protect") else None
    partition = torch.arange(T) % 3 == 1 if options.get("partition") is True else options.get("partition", "alternate")
    draw = torch.Generator()

    def each(s):
        mine = range(start[s], start[s] + lengths[s])
        part = partition[mine.start : mine.stop] if isinstance(partition, torch.Tensor) else partition
        stay = None if protect is None else [n - mine.start for n in protect if n in mine]
        if s == 0:
            draw.manual_seed(4)
        return {"grid": GRIDS[s], "partition": part, "protect": stay or None}

    how = {"num_prefix": 1, "r": 5, "window": options.get("window"), "generator": draw.manual_seed(4)}
    given = inputs_of(T, 3, 0, 8, 0, torch.float32, True, 0)
    as_each_alone(
        backend, "match", lengths, given, each, grid=GRIDS, partition=partition, protect=protect, **how
    )  # fmt: skip


def test_kernels_take_all_sequences_together(backend, monkeypatch):
    def one(*args, **options):
        raise AssertionError("one sequence after another")

    if not dispatch.takes_sequences("match", backend.impl, backend.device, torch.float32, lists=True):
        pytest.skip("takes one sequence after another")
    monkeypatch.setattr(ops, "match", one)
    monkeypatch.setattr(sequences, "apart", one)
    lengths = [1 + t * h * w for t, h, w in GRIDS]
    given = inputs_of(sum(lengths), 3, 0 if SMALL else 4, 8, 0, torch.float32, False, 0)
    given = {name: value.to(backend.device) for name, value in given.items()}
    how = {"lengths": lengths, "impl": backend.impl}
    for options in ({"partition": "frames"}, {"window": (2, 2, 2)}, {"protect": [2, 30]}):
        sttm.match(given["q"], 2, 1, grid=GRIDS, **options, **how)
    if not SMALL:
        functional.assign_merge(**given, **how)
