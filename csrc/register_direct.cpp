// What Python calls at every product: sten._C.direct(name), an operator without the Python side of torch's dispatcher,
// which takes longer than a small product, and sten._C.facts, the key of a Plan.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <tuple>

#include "register.h"

namespace sten {
namespace {

// The integer tensors among the arguments of an operator, which are the parts of a pattern, by address and version.
class Pattern {
 public:
  template <typename... A>
  explicit Pattern(const A&... arguments) {
    (add(arguments), ...);
  }

  bool operator==(const Pattern& other) const {
    return versioned_ == other.versioned_ && count_ == other.count_ && parts_ == other.parts_;
  }

  // Tensors made in inference mode have no version.
  bool versioned() const { return versioned_; }

 private:
  void add(const Tensor& t) {
    if (!at::isIntegralType(t.scalar_type(), false)) return;
    versioned_ = versioned_ && !t.is_inference() && count_ < parts_.size();
    if (versioned_) parts_[count_++] = {t.const_data_ptr(), t._version()};
  }
  void add(const std::optional<Tensor>& t) {
    if (t) add(*t);
  }
  template <typename T>
  void add(const T&) {}

  std::array<std::pair<const void*, int64_t>, 4> parts_{};
  size_t count_ = 0;
  bool versioned_ = true;
};

// The operator as a function of Python. It goes through torch's dispatcher from C++, which takes 0.05 us instead of the
// 2 us of a torch.library operator. The last argument of an operator with a pattern, `trusted`, is not an argument of
// the function, which remembers what it was called with: the bounds of a pattern are checked once, not again while its
// parts and versions are those of the last call.
template <typename... A, typename... Defaults>
py::object call_of(const std::string& name, const Defaults&... defaults) {
  using All = std::tuple<A...>;
  constexpr bool checks = std::is_same_v<std::tuple_element_t<sizeof...(A) - 1, All>, bool>;
  constexpr size_t count = sizeof...(A) - checks;
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("sten::" + name).c_str(), "").typed<Tensor(A...)>();
  return [&]<size_t... I, size_t... Required>(std::index_sequence<I...>, std::index_sequence<Required...>) {
    const auto call = [op, last = std::make_shared<Pattern>()](std::tuple_element_t<I, All>... arguments) {
      HANDLE_TH_ERRORS
      const auto released_call = [&](auto... trusted) {
        const py::gil_scoped_release released;
        return op.call(arguments..., trusted...);
      };
      if constexpr (!checks) {
        return released_call();
      } else {
        const Pattern now(arguments...);
        Tensor y = released_call(now.versioned() && now == *last);
        *last = now;    // only now, and holding the GIL: what failed its check is checked again
        return y;
      }
      END_HANDLE_TH_ERRORS_PYBIND
    };
    return py::cpp_function(call, py::name(name.c_str()), ((void)Required, py::arg())..., defaults...);
  }(std::make_index_sequence<count>(), std::make_index_sequence<count - sizeof...(Defaults)>());
}

py::object direct(const std::string& name) {
  using T = const Tensor&;
  using Maybe = const std::optional<Tensor>&;
  using Int = int64_t;
  using Sizes = at::IntArrayRef;
  const py::arg_v table = py::arg("table") = py::none(), activation = py::arg("activation") = 0;
  if (name == "csr_linear") return call_of<T, T, T, T, Maybe, Int, Int, bool>(name, activation);
  if (name == "nm_linear") return call_of<T, T, T, Maybe, Int, Int, Int, Int, Int>(name, activation);
  if (name == "grouped_nm_linear") return call_of<T, T, T, Maybe, Int, Int, Int, Int, Int, bool>(name, activation);
  if (name == "grouped_nm_grad_input") return call_of<T, T, T, Int, Int, Int, Int, bool>(name);
  if (name == "grouped_nm_grad_values") return call_of<T, T, T, Int, Int, Int, bool>(name);
  if (name == "grouped_nm_conv2d") return call_of<T, T, T, Maybe, Int, Int, Int, Sizes, Int, bool>(name);
  if (name == "band_linear")
    return call_of<T, T, Maybe, T, Maybe, Int, Int, Int, Maybe, Int, bool>(name, table, activation);
  if (name == "band_grad_input") return call_of<T, T, Maybe, T, Int, Int, Int, bool>(name);
  if (name == "band_grad_values") return call_of<T, T, Maybe, T, Int, Int, Int, bool>(name);
  if (name == "band_conv2d") return call_of<T, T, Maybe, T, Maybe, Int, Int, bool, Sizes, Int, bool>(name);
  throw py::value_error("Expected the name of an operator on a weight, got " + name + ".");
}

PyObject* parameter_class = nullptr;

void append(std::vector<int64_t>& key, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
            at::Device device, uintptr_t address) {
  const auto byte = [](auto number) { return static_cast<int64_t>(static_cast<uint8_t>(number)); };
  key.push_back(static_cast<int64_t>(sizes.size()) << 32 | byte(dtype) << 24 | byte(device.type()) << 16 |
                byte(device.index()) << 8 | static_cast<int64_t>(address & 15));
  key.insert(key.end(), sizes.begin(), sizes.end());
  key.insert(key.end(), strides.begin(), strides.end());
}

constexpr const char* kFacts =
    "facts(*operands): shape, strides, dtype, device and alignment of each operand as bytes, or None if one of them is "
    "more than its numbers. `sten._torch_private` has it in Python.";

PyObject* facts(PyObject*, PyObject* const* operands, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::vector<int64_t> key;
  key.reserve(8 * count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const py::handle a = operands[i];
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(a.ptr()));
    if (a.is_none() || PyDict_Check(a.ptr())) {
      key.push_back(-1);
    } else if (type == THPVariableClass || type == parameter_class) {
      const Tensor& t = THPVariable_Unpack(a.ptr());
      if (t.is_neg() || t._is_zerotensor()) Py_RETURN_NONE;
      const at::IntArrayRef strides = t.strides();    // first: what torch says of a sparse tensor is to the point
      append(key, t.sizes(), strides, t.scalar_type(), t.device(), reinterpret_cast<uintptr_t>(t.const_data_ptr()));
    } else if (THPVariable_Check(a.ptr())) {
      Py_RETURN_NONE;
    } else {    // what stands for a tensor in `sten.which`
      append(key, py::cast<std::vector<int64_t>>(a.attr("shape")), py::cast<std::vector<int64_t>>(a.attr("stride")()),
             reinterpret_cast<THPDtype*>(a.attr("dtype").ptr())->scalar_type, py::cast<at::Device>(a.attr("device")),
             py::cast<uintptr_t>(a.attr("data_ptr")()));
    }
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.data()), key.size() * sizeof(int64_t));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"facts", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(facts)), METH_FASTCALL, kFacts}, {}};

}  // namespace

void define_direct(py::module_& m) {
  m.def("direct", &direct, py::arg("name"), "The operator of this name, without the Python side of torch's dispatcher.");
  parameter_class = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  PyModule_AddFunctions(m.ptr(), methods);
}

}  // namespace sten
