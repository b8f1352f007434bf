# known_cuda_architectures(OUT compiler wanted...): those of `wanted` that the CUDA compiler makes code for, the newest with
# its PTX, too, so that later GPUs run it. nvcc before 12.8 knows no 100 and 120, and nvcc before 11.8 no 89 and 90.
function(known_cuda_architectures out compiler)
  execute_process(COMMAND ${compiler} --list-gpu-code OUTPUT_VARIABLE listed ERROR_QUIET RESULT_VARIABLE failed)
  set(known "")
  foreach(architecture IN LISTS ARGN)
    if(failed OR listed MATCHES "sm_${architecture}([^0-9]|$)")  # a compiler that cannot say (clang): all
      list(APPEND known ${architecture})
    endif()
  endforeach()
  if(NOT known)
    message(FATAL_ERROR "${compiler} makes code for none of ${ARGN}: set FASTEDIT_CUDA_ARCHITECTURES to one that it lists "
                        "(nvcc --list-gpu-code), or FASTEDIT_CUDA=OFF.")
  endif()
  list(POP_BACK known newest)
  list(TRANSFORM known APPEND -real)
  set(${out} ${known} ${newest} PARENT_SCOPE)
endfunction()
