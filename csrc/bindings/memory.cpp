#include "bind.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ppo_fast {

// Asks the system for pages of 2 MB for memory that is not in use yet: the first access to each
// page costs more than the arithmetic that fills 4 KB. Where the system has no such pages, nothing
// happens.
void prefer_huge_pages([[maybe_unused]] Address start, [[maybe_unused]] std::int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Address kPage = 4096;
  const Address first = (start + kPage - 1) / kPage * kPage;
  const Address end = (start + static_cast<Address>(num_bytes)) / kPage * kPage;
  if (first < end) madvise(pointer<void>(first), end - first, MADV_HUGEPAGE);
#endif
}

void bind_memory(py::module_& m) {
  m.def("prefer_huge_pages", &prefer_huge_pages, py::kw_only(), py::arg("start"),
        py::arg("num_bytes"), "Ask for large pages under memory that is not in use yet.");
}

}  // namespace ppo_fast
