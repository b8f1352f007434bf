"""python -m tools.imports: import-linter on the sources, whatever the editable install's finder says that the package is.

That finder names the whole checkout as a place of fastedit's modules, so that bench/ and tests/ would count as wings.
"""

import sys

from importlinter.cli import lint_imports_command

if __name__ == "__main__":
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    lint_imports_command()
