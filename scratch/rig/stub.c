#include <stdint.h>
#include <string.h>
#include <stdlib.h>
typedef int R;
#define OK 0
// log of launches: bytes
static unsigned char *LOG; static size_t used, cap; static int logging;
void rig_log(int on){logging=on; used=0; if(!LOG){cap=1<<22; LOG=malloc(cap);} }
size_t rig_used(void){return used;}
unsigned char* rig_bytes(void){return LOG;}
static void put(const void*p,size_t n){ if(used+n<=cap){memcpy(LOG+used,p,n);used+=n;} }
typedef struct {int n; int sizes[512];} Fn;
typedef struct {unsigned gx,gy,gz,bx,by,bz,shared; void* stream; void* attrs; unsigned nattrs;} Cfg;
R cuLaunchKernelEx(const Cfg*c, void*f, void**params, void**extra){
  if(logging){ Fn*fn=f; put(c,7*4); put(&c->stream,8); put(&c->nattrs,4); put(&f,8); for(int i=0;i<fn->n;i++) put(params[i],fn->sizes[i]); }
  return OK; }
static int ctx;
R cuCtxGetCurrent(void**p){*p=&ctx;return OK;}
R cuPointerGetAttribute(uint64_t*out,int a,uint64_t p){*out=p;return OK;}
R cuTensorMapEncodeTiled(uint64_t*m,int dt,unsigned rank,void*addr,const uint64_t*dims,const uint64_t*strides,const unsigned*box,const unsigned*es,int il,int sw,int l2,int oob){
  memset(m,0,128); m[0]=(uint64_t)addr; m[1]=dt|(rank<<8)|(il<<16)|(sw<<20)|(l2<<24)|((uint64_t)oob<<28);
  for(unsigned i=0;i<rank;i++){m[2+i]=dims[i]; if(i+1<rank) m[7+i]=strides[i]; ((unsigned*)(m+11))[i]=box[i];} return OK; }
R cuGetErrorString(int c,const char**s){*s="stub";return OK;}
R cuInit(unsigned f){return OK;}
#define S(n) R n(){return 999;}
S(cuDeviceGet) S(cuDevicePrimaryCtxRetain) S(cuCtxSetCurrent) S(cuFuncSetAttribute) S(cuDeviceGetAttribute) S(cuModuleLoadData) S(cuModuleGetFunction) S(cuFuncGetAttribute) S(cuFuncSetCacheConfig) S(cuOccupancyMaxActiveClusters) S(cuCtxSetLimit) S(cuCtxGetLimit) S(cuDeviceGetName) S(cuCtxGetDevice) S(cuModuleUnload) S(cuTensorMapEncodeIm2col) S(cuStreamIsCapturing) S(cuDeviceGetCount) S(cuMemcpyHtoD) S(cuMemAlloc) S(cuLaunchKernel)

R cuDriverGetVersion(int*v){*v=13000;return 0;} S(cuDeviceComputeCapability) S(cuCtxGetStreamPriorityRange) S(cuFuncLoad) S(cuKernelGetFunction) S(cuLibraryLoadData) S(cuDevicePrimaryCtxGetState) S(cuGetProcAddress) S(cuStreamGetCtx)
