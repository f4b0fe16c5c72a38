"""Where the build puts the native library and build.json; empty in a pure install. See ``imm.ops.native``."""
