import pathlib
import shlex
import shutil
import subprocess
import sysconfig

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
SCRIPTS = ('tpu_vm.sh', 'xpk.sh', 'slurm.sbatch', 'gpu_real.sh')
MAIN = ['--config=configs/rm.py:mesh=v5e-64,model=llama3_8b', '--workdir=/a b']


def _run(name, *args):
  return subprocess.run(['bash', LAUNCH / name, *args], capture_output=True, text=True, check=False)


def _dry(name, *args):
  """Returns the words of the one command that is printed."""
  result = _run(name, '--dry_run', *args)
  assert result.returncode == 0, result.stderr
  return shlex.split(result.stdout)


@pytest.mark.parametrize('name', SCRIPTS)
def test_shellcheck_finds_nothing(name):
  folder = sysconfig.get_path('scripts')
  tool = shutil.which('shellcheck') or shutil.which('shellcheck', path=folder)
  if tool is None:
    pytest.skip('needs shellcheck: pip install -e ".[test]"')
  result = subprocess.run([tool, LAUNCH / name], capture_output=True, text=True, check=False)
  assert not result.stdout + result.stderr


TPU_VM = ('tpu_vm.sh', '--name=n', '--zone=z')


@pytest.mark.parametrize(('topology', 'type_', 'version'), [
  ('v5e-64', 'v5litepod-64', 'v2-alpha-tpuv5-lite'),
  ('v5p-16', 'v5p-16', 'v2-alpha-tpuv5'),
  ('v6e-8', 'v6e-8', 'v2-alpha-tpuv6e'),
])  # fmt: skip
def test_tpu_vm_creates_what_the_cloud_calls_it(topology, type_, version):
  words = _dry(*TPU_VM, f'--topology={topology}', '--spot', 'create')
  assert words[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'create', 'n']
  assert {'--zone=z', f'--accelerator-type={type_}', f'--version={version}',
          '--spot'} <= set(words)  # fmt: skip


def test_tpu_vm_runs_main_on_all_hosts():
  words = _dry(*TPU_VM, 'run', *MAIN)
  assert '--worker=all' in words
  command = next(w for w in words if w.startswith('--command='))
  # The host's shell gets each argument whole.
  inner = shlex.split(command.partition('=')[2])
  assert inner[inner.index('csrm_jax.main') :][:4] == ['csrm_jax.main', '--multihost', *MAIN]
  for action in ('tail', 'delete'):
    assert _dry(*TPU_VM, action)[0] == 'gcloud'


def test_xpk_splits_slices_from_the_type():
  flags = ['--cluster=c', '--zone=z', '--name=n', '--image=i']
  words = _dry('xpk.sh', *flags, '--topology=2xv5e-256', '--', *MAIN)
  assert {'--tpu-type=v5litepod-256', '--num-slices=2'} <= set(words)
  words = _dry('xpk.sh', *flags, '--topology=v5p-16', '--', *MAIN)
  assert {'--tpu-type=v5p-16', '--num-slices=1'} <= set(words)
  inner = shlex.split(words[-1].partition('=')[2])
  assert inner[-2:] == MAIN


def test_slurm_starts_one_process_a_node():
  words = _dry('slurm.sbatch', *MAIN)
  assert words[0] == 'srun'
  assert words[-3:] == ['--multihost', *MAIN]


@pytest.mark.parametrize(('args', 'message'), [
  (('tpu_vm.sh', 'create'), '--name and --zone are required'),
  ((*TPU_VM, '--dry_run', '--topology=h100-8', 'create'), 'v5e-64 or v5p-16'),
  ((*TPU_VM, '--dry_run', 'run'), 'arguments of csrm_jax.main'),
  ((*TPU_VM, '--dry_run', 'stop'), 'create, install, run, tail or delete'),
  ((*TPU_VM, '--nmae=x', 'tail'), '--nmae=x is unknown'),
  (('xpk.sh', '--cluster=c'), '--zone is required'),
  (('slurm.sbatch',), 'arguments of csrm_jax.main'),
  (('slurm.sbatch', '--config=x'), 'no Slurm job'),
])  # fmt: skip
def test_bad_input_is_one_line(args, message):
  result = _run(*args)
  assert result.returncode == 2
  lines = result.stderr.splitlines()
  assert len(lines) == 1, result.stderr
  assert lines[0].startswith('error: ')
  assert message in lines[0]


def test_sky_yaml_has_what_the_tool_needs():
  task = yaml.safe_load((LAUNCH / 'sky.yaml').read_text())
  assert set(task) == {'name', 'resources', 'workdir', 'envs', 'file_mounts', 'setup', 'run'}
  assert task['resources']['use_spot']
  # What `run` names is set, and its work directory survives the machine.
  assert '${ARGS}' in task['run']
  mount = next(iter(task['file_mounts']))
  assert f'--workdir={mount}/' in task['envs']['ARGS']


def test_the_manifest_asks_for_pages_that_the_server_has():
  from csrm_jax import config as config_lib

  deployment, service = yaml.safe_load_all((LAUNCH / 'serve.yaml').read_text())
  (container,) = deployment['spec']['template']['spec']['containers']
  pages = [container[f'{kind}Probe']['httpGet']['path'] for kind in ('liveness', 'readiness')]
  assert pages == ['/health', '/ready']
  assert service['spec']['ports'][0]['targetPort'] == container['ports'][0]['containerPort']
  config = config_lib.load_module(LAUNCH.parent / 'configs' / 'serve.py').get_config()
  assert config.port == container['ports'][0]['containerPort']
  assert [variable['name'] for variable in container['env']] == [config.token_env]
  assert deployment['spec']['template']['spec']['terminationGracePeriodSeconds'] > 5 + 2 * (
    config.deadline_s
  )
  dockerfile = (LAUNCH / 'serve.Dockerfile').read_text()
  mounts = {mount['mountPath'] for mount in container['volumeMounts']}
  assert {'/model', '/policies', '/cache'} <= mounts
  assert 'checkpoint=/model,policies=/policies' in dockerfile


def test_gpu_real_trains_three_folds_and_measures_each():
  result = _run(
    'gpu_real.sh', '--base=/m', '--data_dir=d', '--workdir=/w', '--steps=9', '--dry_run',
    '--', '--config.optim.lr=1e-3',
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  lines = [shlex.split(line) for line in result.stdout.splitlines()]
  assert len(lines) == 6
  for k in range(3):
    train, test = lines[2 * k : 2 * k + 2]
    assert {f'--config.data.judged.fold={k}', '--config.optim.lr=1e-3'} <= set(train)
    assert f'--workdir=/w/fold{k}/test' in test
    # A folder is meant from where the command is given.
    config = next(word for word in test if word.startswith('--config='))
    assert config == f'--config=configs/eval.py:real,checkpoint=/w/fold{k},' + (
      f'data_dir={pathlib.Path.cwd()}/d,side=test'
    )
  assert 'is missing' in _run('gpu_real.sh', '--base=/m').stderr
