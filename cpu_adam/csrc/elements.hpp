// What lies in memory: elements, and layouts of the fp32 master weight. Included inside a namespace, after `V`.

template <int D>
struct Elem {
  using T = std::uint16_t;
};
template <>
struct Elem<kF32> {
  using T = float;
};

template <int D>
inline V::F load(const typename Elem<D>::T* p) {
  if constexpr (D == kF32) return V::load_f32(p);
  else if constexpr (D == kBF16) return V::load_bf16(p);
  else return V::load_f16(p);
}

// Returns what a load would give back.
template <int D>
inline V::F store(typename Elem<D>::T* p, V::F x) {
  if constexpr (D == kF32) {
    V::store_f32(p, x);
    return x;
  } else if constexpr (D == kBF16) {
    return V::store_bf16(p, x);
  } else {
    return V::store_f16(p, x);
  }
}

template <int FMT>
struct Layout;
template <>
struct Layout<kMasterIsParam> {
  using Param = float;
  using Master = char;
  static constexpr bool kHasMaster = false;
  static V::F load(const float* p, const char*) { return V::load_f32(p); }
  static void store(float* p, char*, V::F w) { V::store_f32(p, w); }
};
template <>
struct Layout<kLossless> {
  using Param = std::uint16_t;
  using Master = std::int16_t;
  static constexpr bool kHasMaster = true;
  static V::F load(const Param* p, const Master* r) { return V::join(p, r); }
  static void store(Param* p, Master* r, V::F w) { V::split(p, r, w); }
};
template <>
struct Layout<kMasterBF16> {
  using Param = std::uint16_t;
  using Master = float;
  static constexpr bool kHasMaster = true;
  static V::F load(const Param*, const float* m) { return V::load_f32(m); }
  static void store(Param* p, float* m, V::F w) {
    V::store_f32(m, w);
    V::store_bf16(p, w);
  }
};
template <>
struct Layout<kMasterF16> {
  using Param = std::uint16_t;
  using Master = float;
  static constexpr bool kHasMaster = true;
  static V::F load(const Param*, const float* m) { return V::load_f32(m); }
  static void store(Param* p, float* m, V::F w) {
    V::store_f32(m, w);
    V::store_f16(p, w);
  }
};
template <>
struct Layout<kMaster24> {
  using Param = std::uint16_t;
  using Master = std::uint8_t;  // two's complement
  static constexpr bool kHasMaster = true;
  static V::F load(const Param* p, const Master* c) { return V::join24(p, c); }
};
