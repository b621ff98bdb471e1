"""Distillation methods beside Di[M]O (`dimo.methods.dimo.objective`), a page each."""
