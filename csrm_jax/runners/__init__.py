"""The jobs that `config.runner` names; each module has run(config, workdir)."""
