"""Less precision than is due, or a softmax that holds for small values alone."""

from tests.cheats import Case

PRODUCT = "jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)"
FINE_PRODUCT = PRODUCT.replace("preferred", "precision=jax.lax.Precision.HIGHEST, preferred")
FINE = (
    (PRODUCT, FINE_PRODUCT),
    ("jnp.dot(a, b, preferred", "jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred"),
)

CASES = [
    Case(
        name="one pass of bfloat16 where full float32 is due",
        base="matmul",
        base_edits=FINE,
        edits=((FINE_PRODUCT, PRODUCT),),
        status="FAIL_CORRECTNESS",
        reason="off by more than",
    ),
    Case(
        name="no rescaling of the numerator",
        edits=(("acc_vmem[head] = alpha * acc_vmem[head] + pv", "acc_vmem[head] = acc_vmem[head] + pv"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="no rescaling of the sum",
        edits=(("l_new = alpha * l_vmem[head][:, :1] + ", "l_new = l_vmem[head][:, :1] + "),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="softmax without its maximum",
        edits=(
            ("m_new = jnp.maximum(m_old, jnp.max(scores, axis=1, keepdims=True))", "m_new = jnp.zeros_like(m_old)"),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="weights in five steps",
        edits=(("p = jnp.exp(scores - m_new)", "p = jnp.round(jnp.exp(scores - m_new) * 4) / 4"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="scores rounded to a quarter",
        edits=(
            (
                "scores = jnp.where(visible, scores * sm_scale, mask_value)",
                "scores = jnp.where(visible, jnp.round(scores * sm_scale * 4) / 4, mask_value)",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
]
