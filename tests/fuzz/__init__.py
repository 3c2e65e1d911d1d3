"""Damaged and hostile files given to the command, by the thousand: `python -m tests.fuzz`.

seeds: sound files. mutations: what is done to them. cases: one command line with one spoiled file.
running: each case in a process of its own, within limits of time and memory.
"""
