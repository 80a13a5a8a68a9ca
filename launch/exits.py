"""How a process of a run ends, for whoever started it. 0 is a run that is finished,
or that was asked to stop before it had begun.

The others are those of sysexits.h, since small numbers are also what launchers say of themselves:
srun ends with 2 where there is no such program on a node.
"""

#: A rank was lost or broke: the run may be started again.
FAILED = 1
#: The run saved, left early, and wants to be started again (EX_TEMPFAIL).
TO_BE_CONTINUED = 75
#: An error of the user's (a config, a shard, a checkpoint): it would come again (EX_CONFIG).
REFUSED = 78
