"""pytest finds the rules for comparing outputs from any folder."""


def pytest_configure(config):
    rules = config.option.nbval_sanitize_with
    config.option.nbval_sanitize_with = str(config.rootpath / rules)
