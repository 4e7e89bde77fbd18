// Parse, release the GIL, call. Addresses come as integers; shapes, dtypes and overlap are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "launch.hpp"

namespace py = pybind11;
using namespace cpu_adam;

namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& kernels(int isa) {
  const auto& list = available();
  if (isa < 0 || isa >= static_cast<int>(list.size())) throw py::value_error("isa: no such index in isas()");
  return *list[isa];
}

Dtype dtype(int code) {
  if (code < 0 || code >= kDtypes) throw py::value_error("dtype code: expected F32, BF16 or F16");
  return static_cast<Dtype>(code);
}

Format format(int code) {
  if (code < 0 || code >= kFormats) throw py::value_error("format code: not a master layout");
  return static_cast<Format>(code);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.emplace_back(k->name);
  return names;
}

struct Hyper {
  double decay, l2, beta1, beta2, bias2_sqrt, eps, step_size, unscale, clip;
  bool coupled, maximize;
};

// Double up to here; each constant is rounded to fp32 once, where torch's operators round theirs.
StepArgs make_args(const Hyper& h) {
  StepArgs a{};
  a.unscale = static_cast<float>(h.unscale);
  a.clip = static_cast<float>(h.maximize ? -h.clip : h.clip);
  a.decay = static_cast<float>(h.decay);
  a.l2 = static_cast<float>(h.l2);
  a.lerp = static_cast<float>(1.0 - h.beta1);
  a.lerp_rest = 1.0f - a.lerp;
  a.beta2 = static_cast<float>(h.beta2);
  a.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
  a.bias2_sqrt = static_cast<float>(h.bias2_sqrt);
  a.eps = static_cast<float>(h.eps);
  a.step_size = static_cast<float>(h.step_size);
  a.coupled = h.coupled;
  a.lerp_from_end = !(std::fabs(a.lerp) < 0.5f);
  return a;
}

void adam_step(std::size_t n, int format_code, int grad_dtype, Address param, Address master, Address grad,
               Address exp_avg, Address exp_avg_sq, double decay, double l2, double beta1, double beta2,
               double bias2_sqrt, double eps, double step_size, double unscale, double clip, bool coupled,
               bool maximize, int isa, int threads) {
  const Kernels& k = kernels(isa);
  const Format f = format(format_code);
  const Dtype g = dtype(grad_dtype);
  StepArgs args = make_args({decay, l2, beta1, beta2, bias2_sqrt, eps, step_size, unscale, clip, coupled, maximize});
  args.param = at(param);
  args.master = at(master);
  args.grad = at(grad);
  args.exp_avg = at<float>(exp_avg);
  args.exp_avg_sq = at<float>(exp_avg_sq);
  py::gil_scoped_release release;
  launch_step(k, f, g, args, n, threads);
}

double intake(std::size_t n, Address dst, int dst_dtype, Address src, int src_dtype, bool accumulate, int isa,
              int threads) {
  const Kernels& k = kernels(isa);
  const Dtype d = dtype(dst_dtype), s = dtype(src_dtype);
  py::gil_scoped_release release;
  return launch_intake(k, at(dst), d, at(src), s, accumulate, n, threads);
}

double sum_squares(std::size_t n, Address src, int src_dtype, int isa, int threads) {
  const Kernels& k = kernels(isa);
  const Dtype s = dtype(src_dtype);
  py::gil_scoped_release release;
  return launch_stats(k, at(src), s, n, threads);
}

void split(std::size_t n, Address master, Address param, Address remainder, int isa, int threads) {
  const Kernels& k = kernels(isa);
  py::gil_scoped_release release;
  launch_split(k, at<float>(master), at<std::uint16_t>(param), at<std::int16_t>(remainder), n, threads);
}

void join(std::size_t n, Address param, Address remainder, Address master, int isa, int threads) {
  const Kernels& k = kernels(isa);
  py::gil_scoped_release release;
  launch_join(k, at<std::uint16_t>(param), at<std::int16_t>(remainder), at<float>(master), n, threads);
}

void stream_pattern(std::size_t n, Address read, Address a, Address b, Address c, int isa, int threads) {
  const Kernels& k = kernels(isa);
  py::gil_scoped_release release;
  launch_stream(k, at<float>(read), at<float>(a), at<float>(b), at<float>(c), n, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu_adam, m) {
  m.doc() = "The SIMD kernels behind tierflow.cpu_adam.kernels, on raw addresses.";
  m.attr("F32") = static_cast<int>(kF32);
  m.attr("BF16") = static_cast<int>(kBF16);
  m.attr("F16") = static_cast<int>(kF16);
  m.attr("MASTER_IS_PARAM") = static_cast<int>(kMasterIsParam);
  m.attr("LOSSLESS") = static_cast<int>(kLossless);
  m.attr("MASTER_BF16") = static_cast<int>(kMasterBF16);
  m.attr("MASTER_F16") = static_cast<int>(kMasterF16);
  m.def("isas", &isas);
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); });
  m.def("adam_step", &adam_step, py::arg("n"), py::arg("format"), py::arg("grad_dtype"), py::arg("param"),
        py::arg("master"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("decay"),
        py::arg("l2"), py::arg("beta1"), py::arg("beta2"), py::arg("bias2_sqrt"), py::arg("eps"),
        py::arg("step_size"), py::arg("unscale"), py::arg("clip"), py::arg("coupled"), py::arg("maximize"),
        py::arg("isa"), py::arg("threads"));
  m.def("intake", &intake, py::arg("n"), py::arg("dst"), py::arg("dst_dtype"), py::arg("src"), py::arg("src_dtype"),
        py::arg("accumulate"), py::arg("isa"), py::arg("threads"));
  m.def("sum_squares", &sum_squares, py::arg("n"), py::arg("src"), py::arg("src_dtype"), py::arg("isa"),
        py::arg("threads"));
  m.def("split", &split, py::arg("n"), py::arg("master"), py::arg("param"), py::arg("remainder"), py::arg("isa"),
        py::arg("threads"));
  m.def("join", &join, py::arg("n"), py::arg("param"), py::arg("remainder"), py::arg("master"), py::arg("isa"),
        py::arg("threads"));
  m.def("stream_pattern", &stream_pattern, py::arg("n"), py::arg("read"), py::arg("a"), py::arg("b"), py::arg("c"),
        py::arg("isa"), py::arg("threads"));
}
