import functools
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tarfile

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
SCRIPTS = ('tpu_vm.sh', 'xpk.sh', 'slurm.sbatch', 'gpu_real.sh')
MAIN = ['--config=configs/rm.py:mesh=v5e-64,model=llama3_8b', '--workdir=/a b']


def _run(name, *args, folder=LAUNCH, **env):
  env = {key: value for key, value in os.environ.items() if key != 'HF_TOKEN'} | env
  command = ['bash', folder / name, *args]
  return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def _stub(folder, name, script):
  """Puts a command before all others of that name; returns the PATH."""
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(f'#!/usr/bin/env bash\n{script}\n')
  (folder / name).chmod(0o755)
  return f'{folder}:{os.environ["PATH"]}'


def _dry(name, *args, **env):
  """Returns the words of the one command that is printed."""
  result = _run(name, '--dry_run', *args, **env)
  assert result.returncode == 0, result.stderr
  return shlex.split(result.stdout)


def _tool(name):
  folder = sysconfig.get_path('scripts')
  found = shutil.which(name) or shutil.which(name, path=folder)
  if found is None:
    pytest.skip(f'needs {name}: pip install -e ".[test]"')
  return found


@pytest.mark.parametrize('name', SCRIPTS)
def test_shellcheck_finds_nothing(name):
  command = [_tool('shellcheck'), LAUNCH / name]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert not result.stdout + result.stderr


def test_hadolint_finds_nothing_and_the_image_has_what_setup_takes():
  path = LAUNCH / 'serve.Dockerfile'
  copied = set(re.findall(r'^COPY (\S+) \S+$', path.read_text(), re.MULTILINE))
  packages = set(re.findall(r"'csrm_jax\.\w+': '(\w+)'", (LAUNCH.parent / 'setup.py').read_text()))
  assert copied == packages | {'csrm_jax'}
  command = [_tool('hadolint'), '--no-color', path]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
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
  for action in ('tail', 'status', 'delete'):
    assert _dry(*TPU_VM, action)[0] == 'gcloud'


def test_tpu_vm_queues_for_several_slices():
  queued = (*TPU_VM, '--queued')
  words = _dry(*queued, '--topology=2xv5e-256', '--spot', '--project=p', 'create')
  assert words[3:6] == ['queued-resources', 'create', 'n']
  assert {'--accelerator-type=v5litepod-256', '--runtime-version=v2-alpha-tpuv5-lite',
          '--node-count=2', '--node-prefix=n', '--spot', '--project=p'} <= set(words)  # fmt: skip
  assert '--node-id=n' in _dry(*queued, '--topology=v5p-16', 'create')
  assert {'queued-resources', '--node=all', '--worker=all'} <= set(_dry(*queued, 'run', *MAIN))
  assert {'--node=0', '--worker=0'} <= set(_dry(*queued, 'tail'))
  assert '--force' in _dry(*queued, 'delete')


def test_tpu_vm_ships_the_folder_as_it_is_and_the_token_in_a_file(tmp_path):
  tree = tmp_path / 'tree'
  shutil.copytree(LAUNCH, tree / 'launch', ignore=shutil.ignore_patterns('__pycache__'))
  for name, text in {
    'setup.py': '',
    'edited.py': 'old',
    'gone.py': '',
    '.gitignore': '*.log',
  }.items():
    (tree / name).write_text(text)
  git = functools.partial(subprocess.run, cwd=tree, check=True, capture_output=True)
  git(['git', 'init'])
  git(['git', 'add', '.'])
  git(['git', '-c', 'user.name=n', '-c', 'user.email=e', 'commit', '-m', 'm'])
  (tree / 'edited.py').write_text('new')
  (tree / 'gone.py').unlink()
  (tree / 'added one.py').write_text('')
  (tree / 'out.log').write_text('')
  # Keeps what is copied to hosts, and what it was called with.
  path = _stub(tmp_path / 'bin', 'gcloud', f"""\
echo "$@" >> {tmp_path}/calls
[[ $4 != scp ]] || cp -p "$5" "{tmp_path}/${{6#*:}}\"""")  # fmt: skip
  result = _run(*TPU_VM, 'install', folder=tree / 'launch', PATH=path)
  assert result.returncode == 0, result.stderr
  assert 'not committed' in result.stderr
  with tarfile.open(tmp_path / 'csrm_jax.tar.gz') as shipped:
    assert shipped.extractfile('edited.py').read() == b'new'
    assert 'added one.py' in shipped.getnames()
    assert not {'gone.py', 'out.log'} & set(shipped.getnames())
  calls = (tmp_path / 'calls').read_text()
  assert 'uv venv' in calls and '--python 3.12' in calls

  result = _run(*TPU_VM, 'run', *MAIN, folder=tree / 'launch', PATH=path, HF_TOKEN="it's")
  assert result.returncode == 0, result.stderr
  said = subprocess.run(['bash', '-c', '. ./.csrm_env; echo "$HF_TOKEN"'], cwd=tmp_path,
                        capture_output=True, text=True)  # fmt: skip
  assert said.stdout == "it's\n"
  assert stat.S_IMODE((tmp_path / '.csrm_env').stat().st_mode) == 0o600
  assert "it's" not in (tmp_path / 'calls').read_text()


XPK = ('xpk.sh', '--cluster=c', '--zone=z', '--name=n')


def test_xpk_splits_slices_from_the_type():
  words = _dry(*XPK, '--image=i', '--topology=2xv5e-256', '--', *MAIN)
  assert {'--tpu-type=v5litepod-256', '--num-slices=2'} <= set(words)
  words = _dry(*XPK, '--image=i', '--topology=v5p-16', '--', *MAIN)
  assert {'--tpu-type=v5p-16', '--num-slices=1'} <= set(words)
  inner = shlex.split(words[-1].partition('=')[2])
  assert inner[-2:] == MAIN


# What launch/xpk.sh is called with -> what xpk understands.
XPK_CASES = (
  (
    ('--image=i', '--topology=2xv5e-256', '--project=p', '--max-restarts=3', '--priority=high'),
    {'tpu_type': 'v5litepod-256', 'num_slices': 2, 'docker_image': 'i', 'project': 'p',
     'max_restarts': 3, 'priority': 'high', 'restart_on_exit_codes': '75', 'workload': 'n',
     'cluster': 'c', 'zone': 'z', 'env_file': None},
  ),
  (
    ('--base_image=b', '--device_type=h100-mega-80gb-8', '--num-nodes=4'),
    {'device_type': 'h100-mega-80gb-8', 'base_docker_image': 'b', 'num_nodes': 4,
     'script_dir': str(LAUNCH.parent), 'max_restarts': 10},
  ),
)  # fmt: skip


@pytest.mark.parametrize(('flags', 'expected'), XPK_CASES)
def test_xpk_itself_understands_what_is_printed(flags, expected):
  # The Python of an environment with xpk, which is too large for ours.
  python = os.environ.get('CSRM_XPK_PYTHON')
  if not python:
    pytest.skip('needs CSRM_XPK_PYTHON, the interpreter of an environment with xpk')
  program, *words = _dry(*XPK, *flags, '--', *MAIN)
  assert program == 'xpk'
  script = """
import argparse, json, sys
from xpk.parser import core
parser = argparse.ArgumentParser()
core.set_parser(parser)
print(json.dumps(vars(parser.parse_args(sys.argv[1:])), default=str))
"""
  result = subprocess.run([python, '-c', script, *words], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  found = yaml.safe_load(result.stdout.splitlines()[-1])
  assert {key: str(found[key]) for key in expected} == {
    key: str(value) for key, value in expected.items()
  }
  assert shlex.split(found['command'])[-2:] == MAIN


def test_xpk_takes_the_token_along_by_its_name():
  words = _dry(*XPK, '--image=i', '--topology=v5p-16', '--', *MAIN, HF_TOKEN='secret')
  assert '--env-file=launch/xpk.env' in words and 'secret' not in ' '.join(words)
  assert (LAUNCH / 'xpk.env').read_text().splitlines()[-1] == 'HF_TOKEN'
  own = ('--image=i', '--topology=v5p-16', '--env=A=b', '--', *MAIN)
  words = _dry(*XPK, *own, HF_TOKEN='secret')
  assert '--env=A=b' in words and not any('xpk.env' in word for word in words)


def test_xpk_refuses_an_image_without_the_edits(tmp_path):
  (tmp_path / 'launch').mkdir()
  shutil.copy(LAUNCH / 'xpk.sh', tmp_path / 'launch')
  (tmp_path / 'setup.py').write_text('')
  subprocess.run(['git', 'init'], cwd=tmp_path, check=True, capture_output=True)
  flags = ('--image=i', '--topology=v5p-16', '--', *MAIN)
  result = _run(*XPK, *flags, folder=tmp_path / 'launch')
  assert result.returncode == 2 and 'not committed' in result.stderr


def test_slurm_starts_one_process_a_node():
  words = _dry('slurm.sbatch', *MAIN)
  assert words[0] == 'srun'
  assert words[-3:] == ['--multihost', *MAIN]


@pytest.mark.parametrize(('code', 'state', 'requeued'), [
  (75, 'RUNNING', True),
  (75, 'COMPLETING', False),  # somebody cancelled it
  (1, 'RUNNING', False),
  (0, 'RUNNING', False),
])  # fmt: skip
def test_slurm_requeues_a_job_that_saved(tmp_path, code, state, requeued):
  path = _stub(tmp_path / 'bin', 'srun', f'exit {code}')
  _stub(tmp_path / 'bin', 'squeue', f'echo {state}')
  _stub(tmp_path / 'bin', 'scontrol', f'echo "$@" > {tmp_path}/said')
  result = _run('slurm.sbatch', *MAIN, PATH=path, SLURM_JOB_ID='7')
  assert result.returncode == code, result.stderr
  assert (tmp_path / 'said').exists() == requeued
  if requeued:
    assert (tmp_path / 'said').read_text() == 'requeue 7\n'


@pytest.mark.parametrize(('args', 'message'), [
  (('tpu_vm.sh', 'create'), '--name and --zone are required'),
  ((*TPU_VM, '--dry_run', '--topology=h100-8', 'create'), 'v5e-64 or v5p-16'),
  ((*TPU_VM, '--dry_run', 'run'), 'arguments of csrm_jax.main'),
  ((*TPU_VM, '--dry_run', 'stop'), 'create, install, run, tail, status or delete'),
  ((*TPU_VM, '--nmae=x', 'tail'), '--nmae=x is unknown'),
  (('xpk.sh', '--cluster=c'), '--zone is required'),
  ((*XPK, '--image=i', '--', *MAIN), 'one of --topology and --device_type'),
  ((*XPK, '--topology=v5p-16', '--', *MAIN), 'one of --image and --base_image'),
  ((*TPU_VM, '--dry_run', '--topology=2xv5e-16', 'create'), 'need --queued'),
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
  assert set(task) == {
    'name', 'resources', 'workdir', 'envs', 'secrets', 'file_mounts', 'setup', 'run',
  }  # fmt: skip
  assert task['resources']['use_spot']
  assert task['resources']['job_recovery']['recover_on_exit_codes'] == [75]
  assert 'uv venv' in task['setup']
  # What `run` names is set, and its work directory survives the machine.
  assert '${ARGS}' in task['run']
  mount = next(iter(task['file_mounts']))
  assert f'--workdir={mount}/' in task['envs']['ARGS']


def test_sky_itself_reads_the_task():
  python = os.environ.get('CSRM_SKY_PYTHON')
  if not python:
    pytest.skip('needs CSRM_SKY_PYTHON, the interpreter of an environment with skypilot')
  script = """
import sys
import yaml
from sky.utils import common_utils, schemas
for schema in (schemas.get_task_schema(), schemas.get_resources_schema()):
  task = yaml.safe_load(open(sys.argv[1]))
  common_utils.validate_schema(
    task if 'run' in schema['properties'] else task['resources'], schema, 'not so: ')
print('read')
"""
  command = [python, '-c', script, LAUNCH / 'sky.yaml']
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.stdout.endswith('read\n'), result.stdout + result.stderr


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
