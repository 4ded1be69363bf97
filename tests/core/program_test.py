import textwrap

import jax
import jax.numpy as jnp
import pytest

from csrm_jax.core import program, topology
from tests import small


def test_products_count_two_and_scans_count_all_turns():
  x = jnp.ones((4, 8))

  def body(carry, kernel):
    return jnp.tanh(carry @ kernel), None

  def fn(x, kernels):
    return jax.lax.scan(body, x, kernels)[0].sum()

  kernels = jnp.ones((5, 8, 8))
  once = 2 * 4 * 8 * 8
  assert program.count_flops(fn, x, kernels) == 5 * once
  # The gradient has two products for each; remat computes the first again.
  grad = jax.grad(fn, argnums=(0, 1))
  assert program.count_flops(grad, x, kernels) == 3 * 5 * once
  remat = jax.checkpoint(body, prevent_cse=False)
  grad = jax.grad(lambda x, k: jax.lax.scan(remat, x, k)[0].sum(), argnums=(0, 1))
  assert program.count_flops(grad, x, kernels) == 4 * 5 * once


def test_batched_products_branches_and_loops_without_an_end():
  x = jnp.ones((3, 4, 8))
  einsum = lambda x: jnp.einsum('bij,bkj->bik', x, x)  # noqa: E731
  assert program.count_flops(einsum, x) == 2 * 3 * 4 * 4 * 8
  branch = lambda x: jax.lax.cond(True, einsum, jnp.zeros_like, x)  # noqa: E731
  square = jnp.ones((2, 4, 4))
  assert program.count_flops(branch, square) == 2 * 2 * 4 * 4 * 4
  loop = lambda x: jax.lax.while_loop(  # noqa: E731
    lambda x: x.sum() < 9, lambda x: x @ x, x
  )
  with pytest.raises(ValueError, match='while loop'):
    program.count_flops(loop, jnp.ones((2, 2)))
  assert program.count_flops(loop, jnp.ones((2, 2)), turns=3) == 3 * 16


HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%part (p: bf16[4,8]) -> bf16[64,8] {
  %all-gather.9 = bf16[64,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %f.1 = bf16[64,8] fusion(%p), kind=kCustom, calls=%part
  %f.2 = bf16[64,8] fusion(%p), kind=kCustom, calls=%part
  %cp = (bf16[2,8]{1,0}, bf16[2,8]{1,0:S(1)}, u32[]{:S(2)}, u32[]) \
collective-permute-start(%q), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %rs = f32[2,8]{1,0} reduce-scatter(%q), channel_id=9, \
replica_groups=[2,16]<=[32], to_apply=%add
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> f32[] {
  %w = (s32[], bf16[4,8]) while(%t), condition=%cond, body=%body
  %ar = (f32[10]{0}, f32[6]{0}) all-reduce(%x, %y), channel_id=10, \
replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="step/sum"}
  %done = f32[16] all-gather-done(%start)
}
"""


def test_collectives_count_once_a_turn_however_they_are_written():
  found = {c.kind: c for c in program.collectives(HLO)}
  assert len(found) == 4
  gather = found['all-gather']
  # Spread over two fusions of the loop, which has five turns.
  assert gather.num_bytes == 64 * 8 * 2
  assert gather.group == tuple(range(0, 32, 2))
  assert found['collective-permute'].turns == 5
  assert found['collective-permute'].num_bytes == 2 * 8 * 2
  assert found['reduce-scatter'].num_bytes == 16 * 2 * 8 * 4  # the operand
  assert found['reduce-scatter'].group == tuple(range(16))
  assert found['collective-permute'].group == (0, 1)
  assert found['all-reduce'] == program.Collective('all-reduce', 64, (0, 1, 2, 3), 1, 'step/sum')
  assert gather.turns == 5


@pytest.mark.parametrize(
  ('groups', 'first'),
  [
    ('[4,2]<=[8]', (0, 1)),
    ('[4,2]<=[2,4]T(1,0)', (0, 4)),
    ('{{0,2},{1,3}}', (0, 2)),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
  ],
)
def test_the_first_group_by_its_places(groups, first):
  text = f"""ENTRY %main (p: f32[4]) -> f32[4] {{
  %ar = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add
}}
"""
  assert program.collectives(text)[0].group == first


def test_a_real_program_of_eight_devices():
  """ZeRO-3 by hand: L gathers of the kernel, and a reduction of the loss."""
  script = textwrap.dedent("""
    import jax, jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    from csrm_jax.core import mesh as m, program
    mesh = m.make_mesh(data=1, fsdp=8)

    def fn(x, kernels):
      def body(x, kernel):
        kernel = m.constrain(kernel)
        return m.constrain(jnp.tanh(x @ kernel), m.ROWS), None
      return jax.lax.scan(body, x, kernels)[0].sum()

    def shape(spec, *dims):
      sharding = jax.sharding.NamedSharding(mesh, spec)
      return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)

    args = shape(P(m.ROWS), 16, 32), shape(P(None, 'fsdp'), 6, 32, 32)
    with jax.set_mesh(mesh):
      text = jax.jit(fn).lower(*args).compile().as_text()
    found = {c.kind: c for c in program.collectives(text)}
    assert set(found) == {'all-gather', 'all-reduce'}, found
    gather = found['all-gather']
    assert (gather.num_bytes, gather.group) == (
        32 * 32 * 4, tuple(range(8))), gather
    assert gather.turns == 6, gather
    assert found['all-reduce'].turns == 1
    assert program.local_bytes(args) == (16 * 32 + 6 * 32 * 32) * 4 / 8
    assert program.replicated_fraction(args) == 0
    assert program.replicated_fraction([args[0], shape(P(), 16, 32)]) == 0.5
  """)
  small.run_on_devices(8, script)


V5P = topology.parse('v5p-128')  # 4x4x4, rings of 180 GB/s on three sides
GB = 10**9


def _item(kind, group, num_bytes=54 * GB, turns=1):
  group = group if isinstance(group, tuple) else tuple(range(group))
  return program.Collective(kind, num_bytes, group, turns, '')


def _time(kind, group, target=V5P, num_bytes=54 * GB):
  return program.collective_s(_item(kind, group, num_bytes), target)


def test_collectives_by_hand():
  share = 63 / 64
  assert _time('all-gather', 64) == pytest.approx(0.1 * share)
  assert _time('reduce-scatter', 64) == pytest.approx(0.1 * share)
  assert _time('all-reduce', 64) == pytest.approx(0.2 * share)
  # A group of 4 has the ring of one side alone.
  assert _time('all-gather', 4) == pytest.approx(0.3 * 3 / 4)
  assert _time('all-to-all', 4) == pytest.approx(0.3 * 3 / 4)
  assert _time('collective-permute', 2) == pytest.approx(0.3)
  assert _time('all-gather', 1) == 0


def test_between_slices_each_chip_sends_its_part():
  two = topology.parse('2xv5e-16')
  # All 32 chips reduce 16 GB: over the network 1 GB a chip, there and back,
  # and in each slice as if there were one.
  everyone = _item('all-reduce', 32, 16 * GB)
  assert program.network_s(everyone, two) == pytest.approx(GB / 6.25e9)
  alone = _time('all-reduce', 16, topology.parse('v5e-16'), 16 * GB)
  assert program.collective_s(everyone, two) == pytest.approx(alone)
  # Pairs across slices reduce what each chip already holds a part of.
  pair = _item('all-reduce', (3, 19), GB)
  assert program.network_s(pair, two) == pytest.approx(GB / 6.25e9)
  assert program.collective_s(pair, two) == 0
  # Two neighbours do not go over the network, as many slices as there are.
  assert program.network_s(_item('all-reduce', 2, GB), two) == 0
  times = program.estimate(1.0, 0.0, [pair], two, efficiency=0.5)
  assert times.collectives_s == {'all-reduce': 0, 'between slices': pytest.approx(GB / 6.25e9)}
  assert times.limit == 'between slices'


def test_one_chip_needs_no_links():
  assert _time('all-reduce', 2, topology.parse('v5e-1')) == 0


def test_a_step_lies_between_the_longest_part_and_the_sum():
  found = [_item('all-gather', 4, turns=10)]
  flops = 64 * 459e12
  times = program.estimate(flops, 0.0, found, V5P, efficiency=0.5)
  assert times.compute_s == pytest.approx(2.0)
  assert times.collectives_s == {'all-gather': pytest.approx(2.25)}
  assert times.overlapped_s == pytest.approx(2.25)
  assert times.serial_s == pytest.approx(4.25)
  assert times.limit == 'all-gather'
  times = program.estimate(flops, 3 * 2.765e12, found, V5P, efficiency=0.5)
  assert (times.limit, times.memory_s) == ('memory', pytest.approx(3.0))
  assert times.serial_s == pytest.approx(5.25)
