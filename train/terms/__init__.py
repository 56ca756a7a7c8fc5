"""Terms that read the policy's pass over the winner: L += w_pix L_pix + w_sem L_sem + w_self L_self."""

from train.terms import physics, self_score
from train.terms.contract import Term

TERMS: dict[str, Term] = {"physics": physics, "self_score": self_score}
