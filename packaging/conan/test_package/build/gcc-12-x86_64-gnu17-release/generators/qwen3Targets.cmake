# Load the debug and release variables
file(GLOB DATA_FILES "${CMAKE_CURRENT_LIST_DIR}/qwen3-*-data.cmake")

foreach(f ${DATA_FILES})
    include(${f})
endforeach()

# Create the targets for all the components
foreach(_COMPONENT ${qwen3_COMPONENT_NAMES} )
    if(NOT TARGET ${_COMPONENT})
        add_library(${_COMPONENT} INTERFACE IMPORTED)
        message(${qwen3_MESSAGE_MODE} "Conan: Component target declared '${_COMPONENT}'")
    endif()
endforeach()

if(NOT TARGET qwen3::qwen3)
    add_library(qwen3::qwen3 INTERFACE IMPORTED)
    message(${qwen3_MESSAGE_MODE} "Conan: Target declared 'qwen3::qwen3'")
endif()
# Load the debug and release library finders
file(GLOB CONFIG_FILES "${CMAKE_CURRENT_LIST_DIR}/qwen3-Target-*.cmake")

foreach(f ${CONFIG_FILES})
    include(${f})
endforeach()