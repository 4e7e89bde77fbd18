// Python's view of the engines. Nothing is decided here: arguments are checked by the Python side, outcomes by
// completion.hpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>
#include <tuple>
#include <vector>

#include "array.hpp"
#include "faults.hpp"

namespace py = pybind11;
using namespace tierflow::aio;

namespace {

// Keeps an object's memory exported, hence in place and not resized, for as long as it lives.
class View {
 public:
  View(const py::object& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(view_.buf); }
  uint64_t nbytes() const { return static_cast<uint64_t>(view_.len); }

 private:
  Py_buffer view_;
};

// In slices, so that Ctrl-C is answered: the transfer goes on, the caller does not have to wait for it.
int wait(Ticket& ticket) {
  for (;;) {
    bool done;
    {
      py::gil_scoped_release release;
      done = ticket.wait_for(std::chrono::milliseconds(100));
    }
    if (done) return ticket.failure().error;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

// Requests are (address, offset in the store, length).
TicketPtr submit(Array& array, bool write, bool urgent, const py::list& requests) {
  std::vector<Request> all;
  all.reserve(requests.size());
  for (const py::handle item : requests) {
    const auto request = py::reinterpret_borrow<py::tuple>(item);
    all.push_back({request[0].cast<uintptr_t>(), request[1].cast<uint64_t>(), request[2].cast<uint64_t>()});
  }
  py::gil_scoped_release release;
  return array.submit(write ? Op::Write : Op::Read, urgent, all);
}

std::vector<uint32_t> checksums(const py::object& buffer, bool hardware) {
  const View view(buffer, false);
  std::vector<uint32_t> found(view.nbytes() / kChecksumBytes);
  (hardware ? crc32c_pages : crc32c_pages_table)(reinterpret_cast<const char*>(view.address()), found.size(),
                                                 found.data());
  return found;
}

Op direction(bool write) { return write ? Op::Write : Op::Read; }

void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const std::system_error& error) {
    const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_aio, m) {
  py::register_local_exception_translator(translate);
  m.attr("BUILT_WITH_IO_URING") = built_with_uring();
  m.attr("END_OF_FILE") = kEndOfFile;
  m.attr("CORRUPT") = kCorrupt;
  m.attr("CRC32C_IN_HARDWARE") = crc32c_in_hardware();
  m.def("checksums", &checksums, py::arg("buffer"), py::arg("hardware"));
  m.def("probe_io_uring", &probe_uring, py::call_guard<py::gil_scoped_release>());
  m.def("filesystem_magic", &filesystem_magic, py::arg("fd"));
  m.def("reserve", &reserve, py::arg("fd"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "direct_alignment",
      [](int fd) -> py::object {
        const auto found = direct_alignment(fd);
        return found ? py::object(py::make_tuple(found->memory, found->offset)) : py::object(py::none());
      },
      py::arg("fd"));

  py::class_<View>(m, "View")
      .def(py::init<const py::object&, bool>(), py::arg("object"), py::arg("writable"))
      .def_property_readonly("address", &View::address)
      .def_property_readonly("nbytes", &View::nbytes);

  py::class_<File, FilePtr>(m, "File")
      .def(py::init<int, uint64_t, uint64_t, bool, uint64_t>(), py::arg("fd"), py::arg("alignment"),
           py::arg("memory_alignment"), py::arg("direct"), py::arg("checksummed"))
      .def_property_readonly("fd", &File::fd)
      .def_property_readonly("grain", &File::grain)
      .def("close", &File::close);

  py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Ticket")
      .def("done", &Ticket::done)
      .def("wait", &wait)
      .def_property_readonly("orphaned", &Ticket::orphaned)
      .def_property_readonly("failed_path", [](const Ticket& t) { return t.failure().path; })
      .def_property_readonly("failed_offset", [](const Ticket& t) { return t.failure().offset; })
      .def_property_readonly("failed_length", [](const Ticket& t) { return t.failure().length; })
      .def_property_readonly("seconds", &Ticket::seconds)
      .def_property_readonly("began", &Ticket::began)
      .def_property_readonly("ended", &Ticket::ended);

  py::class_<Engine, EnginePtr>(m, "Engine")
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>())
      .def("abandon", &Engine::abandon)
      .def("bytes_moved", [](Engine& e, bool write) { return e.bytes_moved(direction(write)); }, py::arg("write"));

  py::class_<Array>(m, "Array")
      .def(py::init<std::vector<EnginePtr>, uint64_t, std::vector<unsigned>>(), py::arg("engines"), py::arg("unit"),
           py::arg("pattern"))
      .def("submit", &submit, py::arg("write"), py::arg("urgent"), py::arg("requests"))
      .def("sync", &Array::sync, py::call_guard<py::gil_scoped_release>())
      .def("bytes_moved", [](Array& a, bool write) { return a.bytes_moved(direction(write)); }, py::arg("write"))
      .def("bytes_bounced", &Array::bytes_bounced)
      .def("busy_seconds", [](Array& a, bool write) { return a.busy_seconds(direction(write)); }, py::arg("write"));

  m.def("thread_engine", &make_thread_engine, py::arg("file"), py::arg("path"), py::arg("block_size"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("uring_engine", &make_uring_engine, py::arg("file"), py::arg("path"), py::arg("block_size"),
        py::arg("queue_depth"), py::arg("rings"), py::call_guard<py::gil_scoped_release>());

#ifdef TIERFLOW_AIO_FAULTS
  m.def(
      "inject",
      [](const std::vector<std::tuple<bool, uint64_t, uint64_t, int64_t, int, long>>& rules) {
        std::vector<Fault> faults;
        for (const auto& [write, begin, end, times, error, length] : rules) {
          faults.push_back({direction(write), begin, end, times, error, length});
        }
        set_faults(std::move(faults));
      },
      py::arg("rules"));
#endif
}
