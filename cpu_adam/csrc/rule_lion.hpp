// Lion: the sign of an interpolation, and one moment. See [Note: rounding sequence] in rule_adam.hpp for how to read:
//
//   g = (g * unscale) * clip
//   w = w * (1 - lr * weight_decay)
//   c = fma(1 - beta1, g - m, m)
//   w = w - lr * sign(c)                  sign(0) is 0, the sign of a NaN is that NaN
//   m = fma(1 - beta2, g - m, m)

struct Lion {
  static constexpr bool kExpAvg = true;
  static constexpr bool kExpAvgSq = false;

  V::F decay, share, keep, lr;

  // The order is that of `lion` in rules.py.
  explicit Lion(const float* c)
      : decay(V::set1(c[0])), share(V::set1(c[1])), keep(V::set1(c[2])), lr(V::set1(c[3])) {}

  void update(V::F g, V::F& w, V::F& m, V::F&) const {
    const V::F diff = V::sub(g, m);
    const V::F direction = V::fma(share, diff, m);
    w = V::sub(V::mul(w, decay), V::toward(lr, direction));
    m = V::fma(keep, diff, m);
  }
};

template <bool>
using LionRule = Lion;
