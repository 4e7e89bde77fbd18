// Adam and AdamW.
//
// [Note: rounding sequence] Every operation rounds once to fp32; fma() is one rounding for everyone, and where it is
// not written the product and the sum round separately. With t the step and constants computed in double, then cast:
//
//   g = (g * unscale) * clip              clip carries the sign of `maximize`; 1.0 changes nothing
//   coupled:    g = fma(l2, w, g)         decoupled:  w = w * (1 - lr * weight_decay)
//   m = fma(1 - beta1, g - m, m)          or, for 1 - beta1 >= 0.5:  m = g - (g - m) * beta1', fused
//   v = fma((1 - beta2) * g, g, v * beta2)
//   d = sqrt(v) / sqrt(1 - beta2^t) + eps
//   w = w + (-(lr / (1 - beta1^t)) * m) / d
//
// These are the roundings of torch's mul_, lerp_, addcmul_, div, add and addcdiv_ on AVX2 and AVX-512, vector body
// and tail alike. The square root is IEEE's.

// GENERAL pays for two branches that ordinary AdamW never takes.
template <bool GENERAL>
struct AdamRule {
  static constexpr bool kExpAvg = true;
  static constexpr bool kExpAvgSq = true;

  V::F decay, l2, lerp, lerp_rest, beta2, one_minus_beta2, bias2_sqrt, eps, step_size;
  bool coupled, lerp_from_end;

  // The order is that of `adam` in rules.py.
  explicit AdamRule(const float* c)
      : decay(V::set1(c[0])), l2(V::set1(c[1])), lerp(V::set1(c[2])), lerp_rest(V::set1(1.0f - c[2])),
        beta2(V::set1(c[3])), one_minus_beta2(V::set1(c[4])), bias2_sqrt(V::set1(c[5])), eps(V::set1(c[6])),
        step_size(V::set1(c[7])), coupled(c[1] != 0.0f),
        lerp_from_end(!(c[2] < 0.5f)) {}  // torch's lerp works from the far end for weights of one half or more

  void update(V::F g, V::F& w, V::F& m, V::F& v) const {
    if (GENERAL && coupled) g = V::fma(w, l2, g);
    else w = V::mul(w, decay);
    const V::F diff = V::sub(g, m);
    if (GENERAL && lerp_from_end) m = V::fnma(diff, lerp_rest, g);
    else m = V::fma(lerp, diff, m);
    v = V::fma(V::mul(one_minus_beta2, g), g, V::mul(v, beta2));
    const V::F denom = V::add(V::div(V::sqrt(v), bias2_sqrt), eps);
    w = V::add(w, V::div(V::mul(step_size, m), denom));
  }
};
