"""How it is measured: options, clocks, memory, the machine, and other engines to compare with."""
