"""Distillation methods beside Di[M]O (`dimo.objective`), a page each."""
