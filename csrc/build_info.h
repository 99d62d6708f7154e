// What this extension was built with; read by moka.info().
#pragma once

#include <map>
#include <string>

namespace moka {

std::map<std::string, std::string> build_info();

}  // namespace moka
