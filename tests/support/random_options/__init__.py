"""Combinations of options that nobody has thought of, drawn by a number, and what each of them must not do.

    options.py     what is drawn for one option: the sense it makes, and the nonsense
    machine_options.py, work_options.py, run_options.py, peer_options.py, bench_options.py
                   the options of each command
    scene.py       commands that belong together (a machine, its handler, its device), and the files they need
    forks.py       starts commands as a user does, but in children of a process that has loaded everything
    judge.py       what is wrong with how a command ended
    play.py        plays a scene and has its commands judged

`PYTHONPATH=tests/support python -m random_options FAMILY:NUMBER` plays one and says what it did.
"""
