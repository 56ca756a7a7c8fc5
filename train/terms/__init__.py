"""Terms that read the policy's pass over the winner: L += S (trajectory L_pix + relational L_sem + strength L_self).

S is the preference loss's slope (`train.gdpo.slope`), and 1 in supervised training, whose flow error has that slope.
"""

from train.terms import physics, self_score
from train.terms.contract import Term

TERMS: dict[str, Term] = {"physics": physics, "self_score": self_score}
