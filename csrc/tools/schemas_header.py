"""Write the C++ header with every op's schema from python/imm/ops/schemas.py, which is read alone: no torch is needed.

Usage: schemas_header.py SCHEMAS_PY HEADER
"""

import runpy
import sys
from pathlib import Path

source, header = map(Path, sys.argv[1:])
rows = "\n".join(f'    R"schema({schema})schema",' for schema in runpy.run_path(str(source))["SCHEMAS"])
text = f"// Generated from {source.name}.\n#pragma once\n\nconstexpr const char* kSchemas[] = {{\n{rows}\n}};\n"
header.parent.mkdir(parents=True, exist_ok=True)
if not header.exists() or header.read_text() != text:  # an unchanged header rebuilds nothing
    header.write_text(text)
