"""The compiled CPU path: one C call a step, built where there is a compiler.

product.h multiplies rows with 4-bit and dense weights, adapter.h adds the mixtures, attention.h
reads the pages, forward.h puts them together; team.c holds the threads. Each target_*.c compiles
all of that for one instruction set; library.c chooses. unpack.c reads adapters' files. library.py
calls it.
"""
