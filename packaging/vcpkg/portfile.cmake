# An overlay port beside the sources: vcpkg install qwen3 --overlay-ports=packaging/vcpkg
set(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../..")
vcpkg_check_features(OUT_FEATURE_OPTIONS FEATURE_OPTIONS FEATURES cuda QWEN3_CUDA)
vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}" OPTIONS ${FEATURE_OPTIONS})
vcpkg_cmake_install()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include" "${CURRENT_PACKAGES_DIR}/debug/lib/cmake")
file(MAKE_DIRECTORY "${CURRENT_PACKAGES_DIR}/share/qwen3")
file(RENAME "${CURRENT_PACKAGES_DIR}/lib/cmake/qwen3" "${CURRENT_PACKAGES_DIR}/share/qwen3/cmake")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
