// Adagrad: the sum of squares, and no momentum. See [Note: rounding sequence] in rule_adam.hpp for how to read:
//
//   g = (g * unscale) * clip
//   g = fma(l2, w, g)                     l2 is weight_decay, which is coupled here; 0 changes nothing finite
//   v = fma(g, g, v)
//   w = w + (-lr' * g) / (sqrt(v) + eps)

struct Adagrad {
  static constexpr bool kExpAvg = false;
  static constexpr bool kExpAvgSq = true;

  V::F l2, eps, step_size;

  // The order is that of `adagrad` in rules.py.
  explicit Adagrad(const float* c) : l2(V::set1(c[0])), eps(V::set1(c[1])), step_size(V::set1(c[2])) {}

  void update(V::F g, V::F& w, V::F&, V::F& v) const {
    g = V::fma(w, l2, g);
    v = V::fma(g, g, v);
    w = V::add(w, V::div(V::mul(step_size, g), V::add(V::sqrt(v), eps)));
  }
};

template <bool>
using AdagradRule = Adagrad;
